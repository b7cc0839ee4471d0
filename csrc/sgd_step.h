// The arguments of sgd_step_, checked: what every implementation begins with.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace fastprune::sgd_step {

constexpr const char* kOp = "sgd_step_";
using Tensors = std::vector<Tensor>;

// The arguments of the op, in the order of its schema.
struct Arguments {
  Tensors params, grads, momenta;
  Tensor lr;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, first;
  std::optional<Tensor> grad_scale, found_inf;
  int64_t layers;
  std::optional<Tensor> mask;
  Tensors masked;
  std::optional<Tensor> filter_decay, norms, channel_norms;
  int64_t ord;
};

inline void check_device(const Arguments& step, const char* name, const Tensor& tensor) {
  if (!step.params.empty() && !same_device(tensor, step.params[0]))
    fail(kOp, ": ", name, " must be on the device of params");
}

inline void check_like_params(const Arguments& step, const char* name, const Tensors& tensors) {
  const Tensors& params = step.params;
  if (tensors.size() != params.size())
    fail(kOp, ": ", name, " must have one tensor for each of ", params.size(), " params, got ",
         tensors.size());
  for (size_t i = 0; i < params.size(); ++i)
    if (tensors[i].scalar_type() != params[i].scalar_type() || !same_device(tensors[i], params[i]) ||
        !same_layout(tensors[i], params[i]))
      fail(kOp, ": ", name, "[", i, "] must have the shape, dtype, strides and device of params[", i, "]");
}

inline void check_scalar(const Arguments& step, const char* name, const std::optional<Tensor>& scalar,
                         std::initializer_list<ScalarType> dtypes) {
  if (!scalar) return;
  bool fits = scalar->numel() == 1, listed = false;
  std::string names;
  for (ScalarType dtype : dtypes) {
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    listed = listed || scalar->scalar_type() == dtype;
  }
  if (!fits || !listed)
    fail(kOp, ": ", name, " must be one ", names, ", got ", dtype_name(scalar->scalar_type()), " ",
         list(scalar->sizes()));
  check_device(step, name, *scalar);
}

inline void check_masked(const Arguments& step, size_t layers) {
  const Tensors& masked = step.masked;
  if (!masked.empty() && masked.size() != layers)
    fail(kOp, ": masked must have one tensor for each of ", layers, " layers, got ", masked.size());
  for (size_t i = 0; i < masked.size(); ++i) {
    const ScalarType dtype = masked[i].scalar_type();
    if (!is_supported(dtype) || dtype != masked[0].scalar_type())
      fail(kOp, ": masked must share one dtype of float32, float64, bfloat16, float16; masked[", i, "] has ",
           dtype_name(dtype));
    if (!same_device(masked[i], step.params[0]) || !same_layout(masked[i], step.params[i]))
      fail(kOp, ": masked[", i, "] must have the shape, strides and device of params[", i, "]");
  }
  if (!masked.empty() && !step.mask) fail(kOp, ": masked weights take a mask");
}

inline void check_vectors(const Arguments& step, const std::vector<Layer>& weights) {
  const int64_t n = count_filters(weights);
  const auto check = [&](const char* name, const std::optional<Tensor>& vector, ScalarType dtype) {
    if (!vector) return;
    check_filter_vector(kOp, name, *vector, n, dtype);
    check_device(step, name, *vector);
  };
  check("mask", step.mask, ScalarType::Bool);
  check("filter_decay", step.filter_decay, ScalarType::Float);
  check("norms", step.norms, ScalarType::Float);
  if (!step.channel_norms) return;
  int64_t m = 0;
  for (size_t i = 0; i < weights.size(); ++i) m += step.params[i].size(1);
  check_channel_vector(kOp, "channel_norms", *step.channel_norms, m);
  check_device(step, "channel_norms", *step.channel_norms);
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

// Fails unless all arguments are right; else the filters of the first `layers` params.
inline std::vector<Layer> check(const Arguments& step) {
  std::vector<Layer> weights = check_params(step.params, step.layers);
  check_like_params(step, "grads", step.grads);
  if (step.nesterov && (step.momentum <= 0 || step.dampening != 0))
    fail(kOp, ": nesterov takes a momentum above 0 and no dampening");
  if (step.momentum == 0 && !step.momenta.empty())
    fail(kOp, ": without momentum there are no momenta, got ", step.momenta.size());
  if (step.momentum != 0) check_like_params(step, "momenta", step.momenta);
  check_scalar(step, "lr", step.lr, {ScalarType::Float, ScalarType::Double});
  check_scalar(step, "grad_scale", step.grad_scale, {ScalarType::Float});
  check_scalar(step, "found_inf", step.found_inf, {ScalarType::Float});
  check_masked(step, weights.size());
  check_vectors(step, weights);
  check_ord(kOp, step.ord);
  return weights;
}

// The op, from what does it to arguments that were checked: Run(step, weights).
template <void (*Run)(const Arguments&, const std::vector<Layer>&)>
void op(Tensors params, Tensors grads, Tensors momenta, Tensor lr, double momentum, double dampening,
        double weight_decay, bool nesterov, bool maximize, bool first, std::optional<Tensor> grad_scale,
        std::optional<Tensor> found_inf, int64_t layers, std::optional<Tensor> mask, Tensors masked,
        std::optional<Tensor> filter_decay, std::optional<Tensor> norms, std::optional<Tensor> channel_norms,
        int64_t ord) {
  const Arguments step{std::move(params),
                       std::move(grads),
                       std::move(momenta),
                       std::move(lr),
                       momentum,
                       dampening,
                       weight_decay,
                       nesterov,
                       maximize,
                       first,
                       std::move(grad_scale),
                       std::move(found_inf),
                       layers,
                       std::move(mask),
                       std::move(masked),
                       std::move(filter_decay),
                       std::move(norms),
                       std::move(channel_norms),
                       ord};
  const std::vector<Layer> weights = check(step);
  if (!step.params.empty()) Run(step, weights);
}

}  // namespace fastprune::sgd_step
