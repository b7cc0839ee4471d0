// filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.
#include <cfloat>

#include "launch.cuh"
#include "norm.cuh"
#include "select.cuh"

namespace fastprune::cuda {
namespace {

// 42 registers and 34 KB of shared memory at most: 48 warps on every multiprocessor since sm_80.
constexpr int32_t kBlocksPerSm = 3;

struct Selection {
  bool* mask;        // null: only the norms are wanted
  bool fresh;        // whether the mask holds nothing yet
  uint32_t* ticket;  // 0 before the first launch
  uint32_t blocks;   // of all launches
  int32_t n;
  int32_t k;
};

// mask = scores > the k-th; where a score is not finite, a fresh mask keeps every filter and another stays as
// it is.
__device__ void write_mask(const float* scores, const Selection& to) {
  __shared__ SelectScratch scratch;
  const float threshold = select(scores, to.n, to.k, FLT_MAX, scratch);
  const bool finite = !isnan(threshold);
  if (!finite && !to.fresh) return;
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < to.n; i += kThreads) to.mask[i] = !finite || scores[i] > threshold;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    filter_mask_kernel(const __grid_constant__ Table table, int32_t ord, float* scores, Selection selection) {
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const bool real = place.row < place.layer.rows;
  const int64_t size = real ? place.layer.size : 0;
  const T* row = input<T>(place.layer, 0) + (real ? place.row : 0) * place.layer.size;
  const float narrow = norm_of<SumOf<T>, Access::kRead>(row, size, place, ord);
  const float norm = finite_norm<Access::kRead>(narrow, row, size, place, ord);
  if (real && place.lane == 0) scores[place.layer.first + place.row] = norm;
  if (selection.mask != nullptr && is_last_block(selection.ticket, selection.blocks))
    write_mask(scores, selection);
}

__global__ void __launch_bounds__(kThreads)
    kth_threshold_kernel(const float* scores, int32_t n, int32_t k, float* threshold) {
  __shared__ SelectScratch scratch;
  const float value = select(scores, n, k, INFINITY, scratch);
  if (threadIdx.x == 0) *threshold = value;
}

Plan plan_of(const std::vector<Layer>& layers, int64_t element_size) {
  std::vector<Run> runs;
  runs.reserve(layers.size());
  for (const Layer& layer : layers) runs.push_back({{layer.data}, layer.filters, layer.size});
  return make_plan(runs, element_size);
}

void launch(const Tensor& like, const Plan& plan, int64_t ord, float* scores, const Selection& selection,
            cudaStream_t stream) {
  visit_dtype(like.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_launches(plan, [&](const Table& table, const Launch& grid) {
      filter_mask_kernel<T><<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(
          table, static_cast<int32_t>(ord), scores, selection);
    });
  });
}

void select_filters(const std::vector<Tensor>& weights, const Plan& plan, double rate, int64_t ord,
                    const Tensor& mask, bool fresh) {
  const DeviceGuard guard(weights[0].get_device_index());
  const cudaStream_t stream = current_stream(weights[0]);
  // The scores, and behind them the ticket.
  const Tensor scratch = torch::stable::new_empty(weights[0], {plan.filters + 1}, ScalarType::Float);
  float* scores = static_cast<float*>(scratch.mutable_data_ptr());
  uint32_t* ticket = reinterpret_cast<uint32_t*>(scores + plan.filters);
  STD_CUDA_CHECK(cudaMemsetAsync(ticket, 0, sizeof(*ticket), stream));
  launch(weights[0], plan, ord, scores,
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
  launch(weights[0], plan, ord, static_cast<float*>(scores.mutable_data_ptr()), {}, current_stream(scores));
  return scores;
}

Tensor kth_threshold(Tensor scores, int64_t k) {
  check_scores("kth_threshold", scores, k);
  if (scores.numel() > kMostFilters)
    fail("kth_threshold: at most ", kMostFilters, " scores on CUDA, got ", scores.numel());
  const DeviceGuard guard(scores.get_device_index());
  Tensor threshold = torch::stable::new_empty(scores, {});
  kth_threshold_kernel<<<1, kThreads, 0, current_stream(scores)>>>(
      static_cast<const float*>(scores.const_data_ptr()), static_cast<int32_t>(scores.numel()),
      static_cast<int32_t>(k), static_cast<float*>(threshold.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
