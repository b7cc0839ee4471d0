// filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.
#include <cfloat>

#include "launch.cuh"
#include "reduce.cuh"
#include "select.cuh"
#include "vector.cuh"

namespace fastprune::cuda {
namespace {

// 42 registers and 34 KB of shared memory at most: 48 warps on every multiprocessor since sm_80.
constexpr int32_t kBlocksPerSm = 3;
constexpr int32_t kSums = 2;  // of a thread, so that additions wait less for each other

// A sum of float32 values as exact as one in float64, but at the rate of float32: what an addition rounds
// away is added up too (Knuth's TwoSum).
struct CompensatedSum {
  float sum = 0, lost = 0;
  __device__ void add(float x) {
    const float next = __fadd_rn(sum, x), part = __fadd_rn(next, -sum);
    lost += __fadd_rn(__fadd_rn(sum, -__fadd_rn(next, -part)), __fadd_rn(x, -part));
    sum = next;
  }
  __device__ void add_square(float x) {
    const float square = __fmul_rn(x, x);
    lost += __fmaf_rn(x, x, -square);
    add(square);
  }
  __device__ double value() const { return static_cast<double>(sum) + static_cast<double>(lost); }
};

struct DoubleSum {
  double sum = 0;
  __device__ void add(double x) { sum += x; }
  __device__ void add_square(double x) { sum += x * x; }
  __device__ double value() const { return sum; }
};

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, DoubleSum, CompensatedSum>;

template <int Ord, class Sum, class X>
__device__ void accumulate(Sum& sum, X x) {
  if constexpr (Ord == 1)
    sum.add(fabs(x));
  else
    sum.add_square(x);
}

// One thread's part of Σ |w| or Σ w² over a filter. Which elements it takes depends only on the filter's
// size, not on how it lies in memory: equal weights have equal norms, bit by bit.
template <int Ord, class Sum, class T>
__device__ double sum_part(const T* row, int64_t size, bool aligned, int32_t lane, int32_t lanes) {
  constexpr int32_t kWidth = kVectorBytes / sizeof(T);
  Sum sums[kSums];
  if (aligned) {
    // Not the second, rare way of summing: it would cost registers.
    constexpr int32_t kUnroll = std::is_same_v<Sum, SumOf<T>> ? 4 : 1;
#pragma unroll kUnroll
    for (int64_t k = lane * kWidth; k < size; k += lanes * kWidth) {
      const Vector<T, kWidth> vector = load<kWidth>(row + k);
#pragma unroll
      for (int32_t i = 0; i < kWidth; ++i) accumulate<Ord>(sums[i % kSums], widen(vector.x[i]));
    }
  } else {
    for (int64_t k = lane * kWidth; k < size; k += lanes * kWidth) {
#pragma unroll
      for (int32_t i = 0; i < kWidth; ++i)
        if (k + i < size) accumulate<Ord>(sums[i % kSums], widen(__ldg(row + k + i)));
    }
  }
  double total = 0;
  for (const Sum& sum : sums) total += sum.value();
  return total;
}

template <class Sum, class T>
__device__ float norm_of(const T* row, int64_t size, const Place& place, int32_t ord) {
  const bool aligned = place.layer.aligned;
  const double part = ord == 1 ? sum_part<1, Sum>(row, size, aligned, place.lane, place.lanes)
                               : sum_part<2, Sum>(row, size, aligned, place.lane, place.lanes);
  return static_cast<float>(sum_threads(part, place.layer.shift) / static_cast<double>(place.layer.size));
}

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

template <class T, int32_t Capacity>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void filter_mask_kernel(
    const __grid_constant__ Table<Capacity> table, int32_t ord, float* scores, Selection selection) {
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const bool real = place.row < place.layer.filters;
  const int64_t size = real ? place.layer.size : 0;
  const T* row = static_cast<const T*>(place.layer.in) + (real ? place.row : 0) * place.layer.size;
  float norm = norm_of<SumOf<T>>(row, size, place, ord);
  // The mean may be finite where the sum is too large for float32. All threads take part, whoever asked.
  if (!std::is_same_v<T, double> && __syncthreads_or(!isfinite(norm))) {
    const float wider = norm_of<DoubleSum>(row, size, place, ord);
    if (!isfinite(norm)) norm = wider;
  }
  if (real && place.lane == 0) scores[place.layer.first + place.row] = norm;
  if (selection.mask != nullptr && is_last_block(selection.ticket, selection.blocks))
    write_mask(scores, selection);
}

__global__ __launch_bounds__(kThreads) void kth_threshold_kernel(const float* scores, int32_t n, int32_t k,
                                                                 float* threshold) {
  __shared__ SelectScratch scratch;
  const float value = select(scores, n, k, INFINITY, scratch);
  if (threadIdx.x == 0) *threshold = value;
}

Plan plan_of(const std::vector<Layer>& layers, int64_t element_size) {
  std::vector<Run> runs;
  runs.reserve(layers.size());
  for (const Layer& layer : layers) runs.push_back({layer.data, nullptr, layer.filters, layer.size});
  return make_plan(runs, element_size, 0);
}

void launch(const Tensor& like, const Plan& plan, int64_t ord, float* scores, const Selection& selection,
            cudaStream_t stream) {
  visit_dtype(like.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_launches(plan, [&]<int32_t Capacity>(const Table<Capacity>& table, const Launch& grid) {
      filter_mask_kernel<T, Capacity><<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(
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
