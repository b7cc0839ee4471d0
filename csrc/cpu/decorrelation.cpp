// decorrelation and its backward: contracts in fastprune/ops/decorrelation.py.
#ifdef FASTPRUNE_ISA

#include "simd.inl"
//
#include "gram_penalty.inl"
#include "kernel_covariance.inl"
#include "orthogonality.inl"

namespace fastprune::FASTPRUNE_ISA {

template <class T>
double penalty(const Problem& problem, void* coefficients) {
  using A = Accumulator<T>;
  switch (problem.kind) {
    case Kind::covariance:
      return gram_penalty<T, A>(problem.layers, false, problem.diagonal, static_cast<int32_t*>(coefficients));
    case Kind::correlation:
      return gram_penalty<T, A>(problem.layers, true, false, static_cast<A*>(coefficients));
    case Kind::kernel_covariance:
      return kernel_covariance_penalty<T, A>(problem.layers, problem.diagonal);
    default:
      return orthogonality_penalty<T, A>(problem.layers, static_cast<A*>(coefficients));
  }
}

template <class T>
void gradient(const Problem& problem, double grad, const void* coefficients) {
  using A = Accumulator<T>;
  switch (problem.kind) {
    case Kind::covariance:
      return gram_gradient<T, A>(problem.layers, false, grad, static_cast<const int32_t*>(coefficients));
    case Kind::correlation:
      return gram_gradient<T, A>(problem.layers, true, grad, static_cast<const A*>(coefficients));
    case Kind::kernel_covariance:
      return kernel_covariance_gradient<T, A>(problem.layers, problem.diagonal, grad);
    default:
      return orthogonality_gradient<T, A>(problem.layers, grad, static_cast<const A*>(coefficients));
  }
}

}  // namespace fastprune::FASTPRUNE_ISA

#else

#include <numeric>

#include "../decorrelation_check.h"
#include "host.h"

namespace fastprune {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct GramLayer : DecorrelationLayer {
  std::vector<int32_t> rows;  // the filters that take part
};

struct Problem {
  Kind kind;
  bool diagonal;
  std::vector<GramLayer> layers;
};

}  // namespace fastprune

#define FASTPRUNE_FILE "decorrelation.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

Problem problem_of(const Decorrelation& call, const std::optional<Tensor>& mask) {
  const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  Problem problem{call.kind, call.diagonal, {}};
  for (const DecorrelationLayer& described : call.layers) {
    GramLayer layer{described, {}};
    for (int64_t f = 0; f < layer.filters; ++f)
      if (!kept || kept[layer.first + f]) layer.rows.push_back(static_cast<int32_t>(f));
    problem.layers.push_back(std::move(layer));
  }
  return problem;
}

// Whatever the precision: products of float32 cost a CPU no more than others.
std::tuple<Tensor, Tensor> decorrelation(std::vector<Tensor> weights, std::string kind, bool include_diagonal,
                                         std::optional<Tensor> mask, std::string precision) {
  const Decorrelation call =
      describe_decorrelation("decorrelation", weights, kind, include_diagonal, mask, precision);
  const Problem problem = problem_of(call, mask);
  const ScalarType dtype = coefficient_dtype(call.kind, weights[0]);
  Tensor coefficients = mask ? torch::stable::new_zeros(weights[0], {call.coefficients}, dtype)
                             : torch::stable::new_empty(weights[0], {call.coefficients}, dtype);
  Tensor penalty = torch::stable::new_empty(weights[0], {}, accumulator_dtype(weights[0]));
  const double value = visit_dtype(weights[0].scalar_type(), [&](auto type) -> double {
    return FASTPRUNE_DISPATCH(template penalty<typename decltype(type)::type>, problem,
                              coefficients.mutable_data_ptr());
  });
  if (penalty.scalar_type() == ScalarType::Double)
    *static_cast<double*>(penalty.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(penalty.mutable_data_ptr()) = static_cast<float>(value);
  return {penalty, coefficients};
}

std::vector<Tensor> decorrelation_backward(Tensor grad, std::vector<Tensor> weights, Tensor coefficients,
                                           std::string kind, bool include_diagonal,
                                           std::optional<Tensor> mask, std::string precision) {
  const Decorrelation call =
      describe_decorrelation("decorrelation_backward", weights, kind, include_diagonal, mask, precision);
  check_decorrelation_backward(call, weights, grad, coefficients);
  Problem problem = problem_of(call, mask);
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < weights.size(); ++i) {
    gradients.push_back(empty_like(weights[i], weights[i].scalar_type()));
    problem.layers[i].gradient = gradients[i].mutable_data_ptr();
    if (static_cast<int64_t>(problem.layers[i].rows.size()) < problem.layers[i].filters)
      torch::stable::zero_(gradients[i]);
  }
  const double scale = grad.scalar_type() == ScalarType::Double
                           ? *static_cast<const double*>(grad.const_data_ptr())
                           : static_cast<double>(*static_cast<const float*>(grad.const_data_ptr()));
  visit_dtype(weights[0].scalar_type(), [&](auto type) {
    FASTPRUNE_DISPATCH(template gradient<typename decltype(type)::type>, problem, scale,
                       coefficients.const_data_ptr());
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("decorrelation", TORCH_BOX(&decorrelation));
  library.impl("decorrelation_backward", TORCH_BOX(&decorrelation_backward));
}

}  // namespace fastprune

#endif
