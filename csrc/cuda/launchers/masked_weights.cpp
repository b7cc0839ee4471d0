// masked_weights and its backward: contracts in fastprune/ops/masked_weights.py.
#include "../masked_weights.h"

#include "launcher.h"

namespace fastprune::cuda {
namespace {

std::vector<Tensor> scale_filters(const char* op, const std::vector<Tensor>& inputs, const Tensor& mask,
                                  ScalarType dtype, const std::optional<Tensor>& feedback, bool backward) {
  const auto layers = check_weights(op, inputs);
  check_masked_weights(op, count_filters(layers), mask, dtype, feedback);
  if (inputs.empty()) return {};
  check_same_device(op, "mask", mask, inputs[0]);
  if (feedback) check_same_device(op, "feedback", *feedback, inputs[0]);
  const DeviceGuard guard(inputs[0].get_device_index());
  std::vector<Tensor> outputs;
  std::vector<Run> runs;
  for (size_t i = 0; i < layers.size(); ++i) {
    outputs.push_back(empty_like(inputs[i], dtype));
    runs.push_back({{layers[i].data, outputs[i].mutable_data_ptr()}, layers[i].filters, layers[i].size});
  }
  const Factors factors{
      static_cast<const bool*>(mask.const_data_ptr()),
      backward && feedback ? static_cast<const float*>(feedback->const_data_ptr()) : nullptr,
      backward ? 1.0f : 0.0f,
  };
  const Stream stream = current_stream(inputs[0]);
  const Plan plan = make_plan(runs, std::max(inputs[0].element_size(), outputs[0].element_size()));
  launch_masked_weights(plan, dtype_of(inputs[0]), dtype_of(dtype), factors, stream);
  return outputs;
}

std::vector<Tensor> masked_weights(std::vector<Tensor> weights, Tensor mask, ScalarType dtype,
                                   std::optional<Tensor> feedback) {
  return scale_filters("masked_weights", weights, mask, dtype, feedback, false);
}

std::vector<Tensor> masked_weights_backward(std::vector<Tensor> grads, Tensor mask, ScalarType dtype,
                                            std::optional<Tensor> feedback) {
  return scale_filters("masked_weights_backward", grads, mask, dtype, feedback, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("masked_weights", TORCH_BOX(&masked_weights));
  library.impl("masked_weights_backward", TORCH_BOX(&masked_weights_backward));
}

}  // namespace fastprune::cuda
