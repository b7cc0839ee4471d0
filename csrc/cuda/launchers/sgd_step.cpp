// sgd_step_: contract in fastprune/ops/sgd_step.py.
#include "../../sgd_step.h"

#include "../sgd_step.h"
#include "launcher.h"

namespace fastprune::cuda {
namespace {

using Tensors = std::vector<Tensor>;

const float* pointer_of(const std::optional<Tensor>& scalar) {
  return scalar ? static_cast<const float*>(scalar->const_data_ptr()) : nullptr;
}

Plan plan_of(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& masked,
             const std::vector<Layer>& weights) {
  std::vector<Run> runs;
  runs.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const bool filters = i < weights.size();
    runs.push_back({{params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                     momenta.empty() ? nullptr : momenta[i].mutable_data_ptr(),
                     filters && !masked.empty() ? masked[i].mutable_data_ptr() : nullptr},
                    filters ? weights[i].filters : 0,
                    filters ? weights[i].size : params[i].numel()});
  }
  // Vectors of the params, whatever the masked weights are: the norms are then those of filter_norms.
  return make_plan(runs, params[0].element_size());
}

void sgd_step_(Tensors params, Tensors grads, Tensors momenta, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t layers,
               std::optional<Tensor> mask, Tensors masked, std::optional<Tensor> norms, int64_t ord) {
  const std::vector<Layer> weights = check_sgd_step(params, grads, momenta, momentum, dampening, nesterov,
                                                    grad_scale, found_inf, layers, mask, masked, norms, ord);
  if (params.empty()) return;
  const StepOutputs outputs{masked.empty() ? nullptr : static_cast<const bool*>(mask->const_data_ptr()),
                            norms ? static_cast<float*>(norms->mutable_data_ptr()) : nullptr,
                            static_cast<int32_t>(ord)};
  const DeviceGuard guard(params[0].get_device_index());
  const Stream stream = current_stream(params[0]);
  const Plan plan = plan_of(params, grads, momenta, masked, weights);
  const SgdStep step{lr,
                     momentum,
                     dampening,
                     weight_decay,
                     nesterov,
                     first,
                     maximize,
                     pointer_of(grad_scale),
                     pointer_of(found_inf)};
  launch_sgd_step(plan, dtype_of(params[0]), masked.empty() ? Dtype::float32 : dtype_of(masked[0]), step,
                  outputs, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) { library.impl("sgd_step_", TORCH_BOX(&sgd_step_)); }

}  // namespace fastprune::cuda
