// The arguments of decorrelation and its backward, checked and laid out; what every implementation begins
// with.
#pragma once

#include <limits>
#include <optional>
#include <string>

#include "check.h"
#include "decorrelation.h"

namespace fastprune {

inline Kind parse_kind(const char* op, const std::string& name) {
  if (name == "covariance") return Kind::covariance;
  if (name == "kernel-covariance") return Kind::kernel_covariance;
  if (name == "correlation") return Kind::correlation;
  if (name == "orthogonality") return Kind::orthogonality;
  fail(op, ": kind must be one of covariance, kernel-covariance, correlation, orthogonality; got ", name);
}

inline Precision parse_precision(const char* op, const std::string& name) {
  if (name == "highest") return Precision::highest;
  if (name == "high") return Precision::high;
  if (name == "medium") return Precision::medium;
  fail(op, ": precision must be one of highest, high, medium; got ", name);
}

inline ScalarType accumulator_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType coefficient_dtype(Kind kind, const Tensor& weight) {
  return kind == Kind::covariance ? ScalarType::Int : accumulator_dtype(weight);
}

// What the forward keeps of a layer; fails where that would be beyond int64, with what the layers before
// have.
inline int64_t count_coefficients(const char* op, Kind kind, const DecorrelationLayer& layer) {
  if (kind == Kind::kernel_covariance) return 0;
  if (kind == Kind::orthogonality) return 2 * layer.size;
  const int64_t row = kind == Kind::covariance ? words_per_row(layer.filters) : layer.filters;
  const int64_t count = product_or_zero({layer.filters, row});
  if (count == 0 || count > std::numeric_limits<int64_t>::max() - layer.coefficients)
    fail(op, ": the coefficients of ", layer.filters, " filters are more than 2^63");
  return count;
}

// Checks the arguments that both directions have.
inline Decorrelation describe_decorrelation(const char* op, const std::vector<Tensor>& weights,
                                            const std::string& kind, bool diagonal,
                                            const std::optional<Tensor>& mask, const std::string& precision) {
  const auto layers = check_weights(op, weights);
  Decorrelation call{parse_kind(op, kind), diagonal, {}, {}, 0};
  if (mask) check_filter_vector(op, "mask", *mask, count_filters(layers), ScalarType::Bool);
  call.precision = parse_precision(op, precision);
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto [data, filters, size, first] = layers[i];
    DecorrelationLayer layer{data, nullptr, filters, size, first, call.coefficients, {size, 1, 1}, {1, 1, 1}};
    for (int64_t d = 0; d < 3 && weights[i].dim() == 4; ++d) {
      layer.sizes[d] = weights[i].size(d + 1);
      layer.strides[d] = weights[i].stride(d + 1);
    }
    call.layers.push_back(layer);
    call.coefficients += count_coefficients(op, call.kind, layer);
  }
  return call;
}

// Checks the other arguments of the backward.
inline void check_decorrelation_backward(const Decorrelation& call, const std::vector<Tensor>& weights,
                                         const Tensor& grad, const Tensor& coefficients) {
  const ScalarType dtype = coefficient_dtype(call.kind, weights[0]);
  if (coefficients.scalar_type() != dtype || coefficients.dim() != 1 ||
      coefficients.size(0) != call.coefficients || !coefficients.is_contiguous())
    fail("decorrelation_backward: coefficients must be the forward's, ", dtype_name(dtype), " [",
         call.coefficients, "], got ", dtype_name(coefficients.scalar_type()), " ",
         list(coefficients.sizes()));
  if (grad.scalar_type() != accumulator_dtype(weights[0]) || grad.numel() != 1)
    fail("decorrelation_backward: grad must be a scalar of ", dtype_name(accumulator_dtype(weights[0])),
         ", got ", dtype_name(grad.scalar_type()), " ", list(grad.sizes()));
}

}  // namespace fastprune
