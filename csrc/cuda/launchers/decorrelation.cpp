// decorrelation and its backward: contracts in fastprune/ops/decorrelation.py. The kinds are in
// ../decorrelation_<kind>.cu.
#include "../decorrelation.h"

#include <tuple>

#include "../../decorrelation_check.h"
#include "launcher.h"

namespace fastprune::cuda {
namespace {

int64_t scratch_bytes(const Problem& problem, bool backward) {
  switch (problem.call.kind) {
    case Kind::kernel_covariance:
      return kernel_covariance_scratch(problem, backward);
    case Kind::orthogonality:
      return orthogonality_scratch(problem, backward);
    default:
      return gram_scratch(problem, backward);
  }
}

Problem problem_of(const Decorrelation& call, const char* op, const std::vector<Tensor>& weights,
                   const std::optional<Tensor>& mask) {
  if (mask) check_same_device(op, "mask", *mask, weights[0]);
  return {call, dtype_of(weights[0]), mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
          nullptr};
}

// Memory that the allocator may hand out again once what is on the stream now has run.
Tensor allocate_scratch(Problem& problem, const Tensor& like, bool backward) {
  Tensor scratch = torch::stable::new_empty(like, {scratch_bytes(problem, backward)}, ScalarType::Byte);
  problem.scratch = scratch.mutable_data_ptr();
  return scratch;
}

std::tuple<Tensor, Tensor> decorrelation(std::vector<Tensor> weights, std::string kind, bool include_diagonal,
                                         std::optional<Tensor> mask, std::string precision) {
  constexpr const char* kOp = "decorrelation";
  const Decorrelation call = describe_decorrelation(kOp, weights, kind, include_diagonal, mask, precision);
  Problem problem = problem_of(call, kOp, weights, mask);
  const DeviceGuard guard(weights[0].get_device_index());
  const Stream stream = current_stream(weights[0]);
  Tensor penalty = torch::stable::new_empty(weights[0], {}, accumulator_dtype(weights[0]));
  Tensor coefficients =
      torch::stable::new_empty(weights[0], {call.coefficients}, coefficient_dtype(call.kind, weights[0]));
  const Tensor scratch = allocate_scratch(problem, weights[0], false);
  void *to = penalty.mutable_data_ptr(), *saved = coefficients.mutable_data_ptr();
  switch (call.kind) {
    case Kind::kernel_covariance:
      kernel_covariance_forward(problem, to, stream);
      break;
    case Kind::orthogonality:
      orthogonality_forward(problem, to, saved, stream);
      break;
    default:
      gram_forward(problem, to, saved, stream);
  }
  return {penalty, coefficients};
}

std::vector<Tensor> decorrelation_backward(Tensor grad, std::vector<Tensor> weights, Tensor coefficients,
                                           std::string kind, bool include_diagonal,
                                           std::optional<Tensor> mask, std::string precision) {
  constexpr const char* kOp = "decorrelation_backward";
  const Decorrelation call = describe_decorrelation(kOp, weights, kind, include_diagonal, mask, precision);
  check_decorrelation_backward(call, weights, grad, coefficients);
  check_same_device(kOp, "grad", grad, weights[0]);
  check_same_device(kOp, "coefficients", coefficients, weights[0]);
  Problem problem = problem_of(call, kOp, weights, mask);
  const DeviceGuard guard(weights[0].get_device_index());
  const Stream stream = current_stream(weights[0]);
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < weights.size(); ++i) {
    gradients.push_back(empty_like(weights[i], weights[i].scalar_type()));
    problem.call.layers[i].gradient = gradients[i].mutable_data_ptr();
  }
  const Tensor scratch = allocate_scratch(problem, weights[0], true);
  const void *from = grad.const_data_ptr(), *saved = coefficients.const_data_ptr();
  switch (call.kind) {
    case Kind::kernel_covariance:
      kernel_covariance_backward(problem, from, stream);
      break;
    case Kind::orthogonality:
      orthogonality_backward(problem, from, saved, stream);
      break;
    default:
      gram_backward(problem, from, saved, stream);
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("decorrelation", TORCH_BOX(&decorrelation));
  library.impl("decorrelation_backward", TORCH_BOX(&decorrelation_backward));
}

}  // namespace fastprune::cuda
