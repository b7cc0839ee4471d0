// Reductions over threads. Every thread of the block calls them; the order of the additions is fixed.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fastprune::cuda {

inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// The sum over each aligned group of 2^shift lanes of a warp, in all of its lanes.
__device__ inline double sum_lanes(double x, int32_t shift) {
  for (int32_t offset = (1 << shift) >> 1; offset > 0; offset >>= 1)
    x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

// The sum over each aligned group of 2^shift threads, up to a warp or the whole block, in all of its threads.
__device__ inline double sum_threads(double x, int32_t shift) {
  if (shift <= kWarpShift) return sum_lanes(x, shift);
  constexpr int32_t kWarps = kThreads >> kWarpShift;
  __shared__ double sums[kWarps];
  x = sum_lanes(x, kWarpShift);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int32_t warp = 0; warp < kWarps; ++warp) total += sums[warp];
  __syncthreads();  // before the next sum is put there
  return total;
}

// True in all threads of the one block of `blocks` that is the last to come here. It then sees what all
// blocks wrote before they came. `ticket` was 0 before the launch.
__device__ inline bool is_last_block(uint32_t* ticket, uint32_t blocks) {
  __shared__ bool last;
  __threadfence();  // what this thread wrote comes before its block's ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();  // and what is read from here on comes after all tickets
  return last;
}

}  // namespace fastprune::cuda
