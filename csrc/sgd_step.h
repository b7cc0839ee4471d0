// The arguments of sgd_step_, checked: what every implementation begins with.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace fastprune {

namespace sgd_step {

constexpr const char* kOp = "sgd_step_";
using Tensors = std::vector<Tensor>;

inline void check_like(const Tensors& params, const char* name, const Tensors& tensors) {
  if (tensors.size() != params.size())
    fail(kOp, ": ", name, " must have one tensor for each of ", params.size(), " params, got ",
         tensors.size());
  for (size_t i = 0; i < params.size(); ++i)
    if (tensors[i].scalar_type() != params[i].scalar_type() || !same_device(tensors[i], params[i]) ||
        !same_layout(tensors[i], params[i]))
      fail(kOp, ": ", name, "[", i, "] must have the shape, dtype, strides and device of params[", i, "]");
}

inline void check_scalar(const Tensors& params, const char* name, const std::optional<Tensor>& scalar) {
  if (scalar && (scalar->scalar_type() != ScalarType::Float || scalar->numel() != 1 ||
                 (!params.empty() && !same_device(*scalar, params[0]))))
    fail(kOp, ": ", name, " must be one float32 on the device of params, got ",
         dtype_name(scalar->scalar_type()), " ", list(scalar->sizes()));
}

inline void check_outputs(const Tensors& params, const std::vector<Layer>& weights,
                          const std::optional<Tensor>& mask, const Tensors& masked,
                          const std::optional<Tensor>& norms) {
  if (!masked.empty() && masked.size() != weights.size())
    fail(kOp, ": masked must have one tensor for each of ", weights.size(), " layers, got ", masked.size());
  for (size_t i = 0; i < masked.size(); ++i) {
    const ScalarType dtype = masked[i].scalar_type();
    if (!is_supported(dtype) || dtype != masked[0].scalar_type())
      fail(kOp, ": masked must share one dtype of float32, float64, bfloat16, float16; masked[", i, "] has ",
           dtype_name(dtype));
    if (!same_device(masked[i], params[0]) || !same_layout(masked[i], params[i]))
      fail(kOp, ": masked[", i, "] must have the shape, strides and device of params[", i, "]");
  }
  if (!masked.empty() && !mask) fail(kOp, ": masked weights take a mask");
  const int64_t n = count_filters(weights);
  if (mask) check_filter_vector(kOp, "mask", *mask, n, ScalarType::Bool);
  if (norms) check_filter_vector(kOp, "norms", *norms, n, ScalarType::Float);
  if (mask && !params.empty()) check_same_device(kOp, "mask", *mask, params[0]);
  if (norms && !params.empty()) check_same_device(kOp, "norms", *norms, params[0]);
}

// The filters of the first `layers` params.
inline std::vector<Layer> check_params(const Tensors& params, int64_t layers) {
  const int64_t count = params.size();
  if (layers < 0 || layers > count)
    fail(kOp, ": layers must be in [0, ", count, "], the number of params, got ", layers);
  check_dtype_and_device(kOp, "params", params);
  std::vector<Layer> weights = check_weights(kOp, Tensors(params.begin(), params.begin() + layers), "params");
  for (int64_t i = 0; i < count; ++i)
    if (!is_dense(params[i]))
      fail(kOp, ": params[", i, "] must be dense (one run of memory, in whatever order), got strides ",
           list(params[i].strides()));
  return weights;
}

}  // namespace sgd_step

// Fails unless all arguments are right; else the filters of the first `layers` params.
inline std::vector<Layer> check_sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                         const std::vector<Tensor>& momenta, double momentum,
                                         double dampening, bool nesterov,
                                         const std::optional<Tensor>& grad_scale,
                                         const std::optional<Tensor>& found_inf, int64_t layers,
                                         const std::optional<Tensor>& mask, const std::vector<Tensor>& masked,
                                         const std::optional<Tensor>& norms, int64_t ord) {
  using namespace sgd_step;
  std::vector<Layer> weights = check_params(params, layers);
  check_like(params, "grads", grads);
  if (nesterov && (momentum <= 0 || dampening != 0))
    fail(kOp, ": nesterov takes a momentum above 0 and no dampening");
  if (momentum == 0 && !momenta.empty())
    fail(kOp, ": without momentum there are no momenta, got ", momenta.size());
  if (momentum != 0) check_like(params, "momenta", momenta);
  check_scalar(params, "grad_scale", grad_scale);
  check_scalar(params, "found_inf", found_inf);
  check_outputs(params, weights, mask, masked, norms);
  check_ord(kOp, ord);
  return weights;
}

}  // namespace fastprune
