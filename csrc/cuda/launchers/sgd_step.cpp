// sgd_step_: contract in fastprune/ops/sgd_step.py.
#include "../../sgd_step.h"

#include "../sgd_step.h"
#include "../sgd_step_channels.h"
#include "launcher.h"

namespace fastprune::cuda {
namespace {

using sgd_step::Arguments;

template <class T>
const T* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

Plan plan_of(const Arguments& step, const std::vector<Layer>& weights) {
  std::vector<Run> runs;
  runs.reserve(step.params.size());
  for (size_t i = 0; i < step.params.size(); ++i) {
    const bool filters = i < weights.size();
    runs.push_back({{step.params[i].mutable_data_ptr(), step.grads[i].const_data_ptr(),
                     step.momenta.empty() ? nullptr : step.momenta[i].mutable_data_ptr(),
                     filters && !step.masked.empty() ? step.masked[i].mutable_data_ptr() : nullptr},
                    filters ? weights[i].filters : 0,
                    filters ? weights[i].size : step.params[i].numel()});
  }
  // Vectors of the params, whatever the masked weights are: the norms are then those of filter_norms.
  return make_plan(runs, step.params[0].element_size());
}

ChannelPlan channel_plan_of(const Arguments& step, const std::vector<Layer>& weights) {
  std::vector<ChannelRun> runs;
  for (const ChannelView& view : channel_views(step.params, weights))
    runs.push_back({view.data, view.rows, view.channels, view.inner});
  return make_channel_plan(runs);
}

void run(const Arguments& step, const std::vector<Layer>& weights) {
  const DeviceGuard guard(step.params[0].get_device_index());
  const Stream stream = current_stream(step.params[0]);
  const Dtype dtype = dtype_of(step.params[0]);
  const StepOutputs outputs{step.masked.empty() ? nullptr : pointer_of<bool>(step.mask),
                            step.norms ? static_cast<float*>(step.norms->mutable_data_ptr()) : nullptr,
                            static_cast<int32_t>(step.ord)};
  const SgdStep settings{step.momentum,
                         step.dampening,
                         step.weight_decay,
                         step.nesterov,
                         step.first,
                         step.maximize,
                         dtype_of(step.lr),
                         step.lr.const_data_ptr(),
                         pointer_of<float>(step.grad_scale),
                         pointer_of<float>(step.found_inf),
                         pointer_of<float>(step.filter_decay)};
  launch_sgd_step(plan_of(step, weights), dtype,
                  step.masked.empty() ? Dtype::float32 : dtype_of(step.masked[0]), settings, outputs, stream);
  if (step.channel_norms)
    launch_channel_norms(channel_plan_of(step, weights), dtype,
                         static_cast<float*>(step.channel_norms->mutable_data_ptr()), outputs.ord, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("sgd_step_", TORCH_BOX(&sgd_step::op<run>));
}

}  // namespace fastprune::cuda
