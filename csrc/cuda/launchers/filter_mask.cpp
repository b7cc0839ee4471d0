// filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.
#include "../filter_mask.h"

#include "launcher.h"

namespace fastprune::cuda {
namespace {

Plan plan_of(const std::vector<Layer>& layers, int64_t element_size) {
  std::vector<Run> runs;
  runs.reserve(layers.size());
  for (const Layer& layer : layers) runs.push_back({{layer.data}, layer.filters, layer.size});
  return make_plan(runs, element_size);
}

void select_filters(const std::vector<Tensor>& weights, const Plan& plan, double rate, int64_t ord,
                    const Tensor& mask, bool fresh) {
  const DeviceGuard guard(weights[0].get_device_index());
  const Stream stream = current_stream(weights[0]);
  // The scores, and behind them the ticket.
  const Tensor scratch = torch::stable::new_empty(weights[0], {plan.filters + 1}, ScalarType::Float);
  float* scores = static_cast<float*>(scratch.mutable_data_ptr());
  uint32_t* ticket = reinterpret_cast<uint32_t*>(scores + plan.filters);
  launch_filter_mask(
      plan, dtype_of(weights[0]), ord, scores,
      {static_cast<bool*>(mask.mutable_data_ptr()), fresh, ticket, static_cast<uint32_t>(plan.blocks),
       static_cast<int32_t>(plan.filters), static_cast<int32_t>(threshold_rank(plan.filters, rate))},
      stream);
}

Tensor filter_norms(std::vector<Tensor> weights, int64_t ord) {
  const auto layers = check_weights("filter_norms", weights);
  check_ord("filter_norms", ord);
  const Plan plan = plan_of(layers, weights[0].element_size());
  const DeviceGuard guard(weights[0].get_device_index());
  Tensor scores = torch::stable::new_empty(weights[0], {plan.filters}, ScalarType::Float);
  launch_filter_mask(plan, dtype_of(weights[0]), ord, static_cast<float*>(scores.mutable_data_ptr()), {},
                     current_stream(scores));
  return scores;
}

Tensor kth_threshold(Tensor scores, int64_t k) {
  check_scores("kth_threshold", scores, k);
  if (scores.numel() > kMostFilters)
    fail("kth_threshold: at most ", kMostFilters, " scores on CUDA, got ", scores.numel());
  const DeviceGuard guard(scores.get_device_index());
  Tensor threshold = torch::stable::new_empty(scores, {});
  launch_kth_threshold(static_cast<const float*>(scores.const_data_ptr()), scores.numel(), k,
                       static_cast<float*>(threshold.mutable_data_ptr()), current_stream(scores));
  return threshold;
}

Tensor filter_mask(std::vector<Tensor> weights, double rate, int64_t ord) {
  check_rate("filter_mask", rate);
  const auto layers = check_weights("filter_mask", weights);
  check_ord("filter_mask", ord);
  const Plan plan = plan_of(layers, weights[0].element_size());
  const DeviceGuard guard(weights[0].get_device_index());
  Tensor mask = torch::stable::new_empty(weights[0], {plan.filters}, ScalarType::Bool);
  select_filters(weights, plan, rate, ord, mask, true);
  return mask;
}

void update_filter_masks_(std::vector<Tensor> weights, double rate, int64_t ord, Tensor mask) {
  check_rate("update_filter_masks_", rate);
  const auto layers = check_weights("update_filter_masks_", weights);
  check_ord("update_filter_masks_", ord);
  check_filter_vector("update_filter_masks_", "mask", mask, count_filters(layers), ScalarType::Bool);
  if (weights.empty()) return;
  check_same_device("update_filter_masks_", "mask", mask, weights[0]);
  select_filters(weights, plan_of(layers, weights[0].element_size()), rate, ord, mask, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("filter_norms", TORCH_BOX(&filter_norms));
  library.impl("kth_threshold", TORCH_BOX(&kth_threshold));
  library.impl("filter_mask", TORCH_BOX(&filter_mask));
  library.impl("update_filter_masks_", TORCH_BOX(&update_filter_masks_));
}

}  // namespace fastprune::cuda
