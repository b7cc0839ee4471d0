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
      return gram_penalty<T, A>(problem.layers, false, problem.diagonal, static_cast<int8_t*>(coefficients));
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
      return gram_gradient<T, A>(problem.layers, false, grad, static_cast<const int8_t*>(coefficients));
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

#include "host.h"

namespace fastprune {

enum class Kind { covariance, kernel_covariance, correlation, orthogonality };

// Below this share of its norm, a centred filter is constant up to rounding; as in
// fastprune/ops/reference.py.
constexpr double kConstantFilter = 1e-6;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct GramLayer {
  const void* data;
  void* gradient;             // backward only; same layout as data
  int64_t filters, size;      // F, K
  std::vector<int32_t> rows;  // the filters that take part
  int64_t coefficients;       // where the layer's begin
  int64_t sizes[3];           // C, kh, kw; 1 for dimensions that are not there
  int64_t strides[3];         // of the same
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

Kind parse_kind(const char* op, const std::string& name) {
  if (name == "covariance") return Kind::covariance;
  if (name == "kernel-covariance") return Kind::kernel_covariance;
  if (name == "correlation") return Kind::correlation;
  if (name == "orthogonality") return Kind::orthogonality;
  fail(op, ": kind must be one of covariance, kernel-covariance, correlation, orthogonality; got ", name);
}

Problem describe(const char* op, const std::vector<Tensor>& weights, const std::string& kind, bool diagonal,
                 const std::optional<Tensor>& mask, int64_t* coefficients) {
  const auto layers = check_weights(op, weights);
  Problem problem{parse_kind(op, kind), diagonal, {}};
  if (mask) check_filter_vector(op, "mask", *mask, count_filters(layers), ScalarType::Bool);
  const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  *coefficients = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    GramLayer layer{layers[i].data, nullptr, layers[i].filters, layers[i].size, {}, *coefficients, {}, {}};
    for (int64_t f = 0; f < layer.filters; ++f)
      if (!kept || kept[layers[i].first + f]) layer.rows.push_back(static_cast<int32_t>(f));
    for (int64_t d = 0; d < 3; ++d) {
      const bool there = weights[i].dim() == 4 || d == 0;
      layer.sizes[d] = there ? (weights[i].dim() == 4 ? weights[i].size(d + 1) : layer.size) : 1;
      layer.strides[d] = weights[i].dim() == 4 ? weights[i].stride(d + 1) : 1;
    }
    problem.layers.push_back(layer);
    if (problem.kind == Kind::covariance || problem.kind == Kind::correlation)
      *coefficients += layer.filters * layer.filters;
    else if (problem.kind == Kind::orthogonality)
      *coefficients += 2 * layer.size;
  }
  return problem;
}

ScalarType accumulator_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

ScalarType coefficient_dtype(Kind kind, const Tensor& weight) {
  return kind == Kind::covariance ? ScalarType::Char : accumulator_dtype(weight);
}

std::tuple<Tensor, Tensor> decorrelation(std::vector<Tensor> weights, std::string kind, bool include_diagonal,
                                         std::optional<Tensor> mask) {
  int64_t count;
  const Problem problem = describe("decorrelation", weights, kind, include_diagonal, mask, &count);
  const ScalarType dtype = coefficient_dtype(problem.kind, weights[0]);
  Tensor coefficients = mask ? torch::stable::new_zeros(weights[0], {count}, dtype)
                             : torch::stable::new_empty(weights[0], {count}, dtype);
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
                                           std::optional<Tensor> mask) {
  int64_t count;
  Problem problem = describe("decorrelation_backward", weights, kind, include_diagonal, mask, &count);
  const ScalarType dtype = coefficient_dtype(problem.kind, weights[0]);
  if (coefficients.scalar_type() != dtype || coefficients.dim() != 1 || coefficients.size(0) != count)
    fail("decorrelation_backward: coefficients must be the forward's, ", dtype_name(dtype), " [", count,
         "], got ", dtype_name(coefficients.scalar_type()), " ", list(coefficients.sizes()));
  if (grad.scalar_type() != accumulator_dtype(weights[0]) || grad.numel() != 1)
    fail("decorrelation_backward: grad must be a scalar of ", dtype_name(accumulator_dtype(weights[0])),
         ", got ", dtype_name(grad.scalar_type()), " ", list(grad.sizes()));
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
