// filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.
#include <cfloat>

#include "filter_mask.h"
#include "launch.cuh"
#include "norm.cuh"
#include "select.cuh"

namespace fastprune::cuda {
namespace {

// 42 registers and 34 KB of shared memory at most: 48 warps on every multiprocessor since sm_80.
constexpr int32_t kBlocksPerSm = 3;

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

}  // namespace

void launch_filter_mask(const Plan& plan, Dtype dtype, int64_t ord, float* scores, const Selection& selection,
                        Stream stream) {
  if (selection.mask) clear(selection.ticket, sizeof(*selection.ticket), stream);
  visit_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_launches(plan, [&](const Table& table, const Launch& grid) {
      filter_mask_kernel<T><<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(
          table, static_cast<int32_t>(ord), scores, selection);
    });
  });
}

void launch_kth_threshold(const float* scores, int64_t n, int64_t k, float* threshold, Stream stream) {
  kth_threshold_kernel<<<1, kThreads, 0, stream>>>(scores, static_cast<int32_t>(n), static_cast<int32_t>(k),
                                                   threshold);
  check_launch();
}

}  // namespace fastprune::cuda
