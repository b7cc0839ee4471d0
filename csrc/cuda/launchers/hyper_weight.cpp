// hyper_weight and its backward: contracts in fastprune/ops/hyper_weight.py.
#include "../../hyper_weight.h"

#include <tuple>

#include "../hyper_weight.h"
#include "launcher.h"

namespace fastprune::cuda {
namespace hyper {
namespace {

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

using Shape = std::vector<int64_t>;

Tensor forward(Tensor hidden, Tensor weight, Tensor bias, int64_t out_channels, int64_t in_channels,
               Shape shape, ScalarType dtype, bool channels_last) {
  const HyperSlice slice =
      check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype, channels_last);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor generated = empty_generated(slice, weight, shape, dtype, channels_last);
  const Geometry g = make_geometry(slice, weight.element_size(), is_aligned(weight));
  launch_forward(g, dtype_of(weight), dtype_of(dtype),
                 {hidden.const_data_ptr(), weight.const_data_ptr(), bias.const_data_ptr()},
                 generated.mutable_data_ptr(), current_stream(weight));
  return generated;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor hidden, Tensor weight, Shape shape) {
  const HyperSlice slice = check_hyper_weight_backward(grad, hidden, weight, shape);
  const DeviceGuard guard(weight.get_device_index());
  const ScalarType dtype = weight.scalar_type();
  const Tensor to_hidden = empty_like(hidden, dtype), to_weight = empty_like(weight, dtype);
  const Tensor to_bias = torch::stable::new_empty(weight, {slice.rows()});
  const int64_t element_size = weight.element_size();
  const Geometry g = make_geometry(slice, element_size, is_aligned(weight) && is_aligned(to_weight));
  const int64_t slots = int64_t{g.slots()} * g.columns(kVectorBytes / element_size);
  const Tensor scratch = torch::stable::new_empty(weight, {slots + (g.panels() + 1) / 2}, ScalarType::Double);
  double* sums = static_cast<double*>(scratch.mutable_data_ptr());
  launch_backward(g, dtype_of(weight), dtype_of(grad), grad.const_data_ptr(),
                  {hidden.const_data_ptr(), weight.const_data_ptr(), nullptr},
                  {to_hidden.mutable_data_ptr(), to_weight.mutable_data_ptr(), to_bias.mutable_data_ptr(),
                   sums, reinterpret_cast<uint32_t*>(sums + slots)},
                  current_stream(weight));
  return {to_hidden, to_weight, to_bias};
}

}  // namespace
}  // namespace hyper

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("hyper_weight", TORCH_BOX(&hyper::forward));
  library.impl("hyper_weight_backward", TORCH_BOX(&hyper::backward));
}

}  // namespace fastprune::cuda
