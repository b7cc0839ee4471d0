// weight_mask: contract in fastprune/ops/weight_mask.py.
#include "../../weight_mask.h"

#include "../weight_mask.h"
#include "launcher.h"

namespace fastprune::cuda {
namespace {

Formula formula_of(Importance importance) {
  if (importance == Importance::taylor) return Formula::product;
  return importance == Importance::l2 ? Formula::square : Formula::magnitude;
}

std::vector<Tensor> weight_mask(std::vector<Tensor> weights, double rate, std::string name,
                                std::vector<Tensor> grads) {
  const auto [layers, importance] = check_weight_mask(weights, rate, name, grads);
  if (weights.empty()) return {};
  const Formula formula = formula_of(importance);
  const DeviceGuard guard(weights[0].get_device_index());
  const Stream stream = current_stream(weights[0]);

  std::vector<Tensor> masks;
  std::vector<Run> runs;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    masks.push_back(empty_like(weights[i], ScalarType::Bool));
    const void* a = importance == Importance::grad ? grads[i].const_data_ptr() : layers[i].data;
    const void* b = formula == Formula::product ? grads[i].const_data_ptr() : nullptr;
    runs.push_back({{a, b, masks[i].mutable_data_ptr()}, 0, weights[i].numel()});
    total += weights[i].numel();
  }
  const Plan plan = make_plan(runs, weights[0].element_size());
  Tensor scratch = torch::stable::new_empty(weights[0], {sizeof(WeightSelection)}, ScalarType::Byte);
  auto* selection = static_cast<WeightSelection*>(scratch.mutable_data_ptr());
  launch_weight_mask(plan, dtype_of(weights[0]), formula, threshold_rank(total, rate), selection, stream);
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) { library.impl("weight_mask", TORCH_BOX(&weight_mask)); }

}  // namespace fastprune::cuda
