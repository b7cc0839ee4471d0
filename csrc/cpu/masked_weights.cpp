// masked_weights and its backward: contracts in fastprune/ops/masked_weights.py.
#ifdef FASTPRUNE_ISA

#include "filters.inl"

#else

#include "host.h"

#define FASTPRUNE_FILE "masked_weights.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

// Every filter of `inputs` times scale(filter) in `dtype`; where the scale is 0, zeros without reading the
// filter.
template <class Scale>
std::vector<Tensor> scale_filters(const std::vector<Tensor>& inputs, const std::vector<Layer>& layers,
                                  ScalarType dtype, const Scale& scale) {
  std::vector<Tensor> outputs;
  outputs.reserve(inputs.size());
  for (const Tensor& input : inputs) outputs.push_back(empty_like(input, dtype));
  visit_dtype(inputs[0].scalar_type(), [&](auto in_type) {
    visit_dtype(dtype, [&](auto out_type) {
      using In = typename decltype(in_type)::type;
      using Out = typename decltype(out_type)::type;
      for_filters(layers, [&](size_t i, int64_t begin, int64_t end) {
        const Layer& layer = layers[i];
        const In* in = static_cast<const In*>(layer.data);
        Out* out = static_cast<Out*>(outputs[i].mutable_data_ptr());
        for (int64_t f = begin; f < end; ++f) {
          Out* row = out + f * layer.size;
          const float factor = scale(layer.first + f);
          if (factor == 0)
            std::memset(static_cast<void*>(row), 0, layer.size * sizeof(Out));
          else
            FASTPRUNE_DISPATCH(scale_row, in + f * layer.size, layer.size, factor, row);
        }
      });
    });
  });
  return outputs;
}

std::vector<Tensor> masked_weights(std::vector<Tensor> weights, Tensor mask, ScalarType dtype,
                                   std::optional<Tensor> feedback) {
  const auto layers = check_weights("masked_weights", weights);
  check_masked_weights("masked_weights", count_filters(layers), mask, dtype, feedback);
  const bool* kept = static_cast<const bool*>(mask.const_data_ptr());
  return scale_filters(weights, layers, dtype, [&](int64_t f) { return kept[f] ? 1.0f : 0.0f; });
}

std::vector<Tensor> masked_weights_backward(std::vector<Tensor> grads, Tensor mask, ScalarType dtype,
                                            std::optional<Tensor> feedback) {
  const auto layers = check_weights("masked_weights_backward", grads);
  check_masked_weights("masked_weights_backward", count_filters(layers), mask, dtype, feedback);
  const bool* kept = static_cast<const bool*>(mask.const_data_ptr());
  const float* factors = feedback ? static_cast<const float*>(feedback->const_data_ptr()) : nullptr;
  return scale_filters(grads, layers, dtype,
                       [&](int64_t f) { return kept[f] || !factors ? 1.0f : factors[f]; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("masked_weights", TORCH_BOX(&masked_weights));
  library.impl("masked_weights_backward", TORCH_BOX(&masked_weights_backward));
}

}  // namespace fastprune

#endif
