// The k-th smallest of many float32 values, by one block.
#pragma once

#include <cmath>
#include <cstdint>

#include "reduce.cuh"

namespace fastprune::cuda {

inline constexpr int32_t kDigitBits = 8;
inline constexpr int32_t kDigits = 1 << kDigitBits;

// A column of counters for each lane: the values of a model resemble each other, and lanes that count the
// same digit would wait for each other. Every lane has a bank of its own, too.
struct SelectScratch {
  uint32_t counts[kDigits][32];
  uint32_t totals[kDigits];
  uint32_t digit;
  uint32_t rank;
};

// Unsigned integers in the order of the values: NaN with the sign bit first, other NaN last, -0 before 0.
__device__ inline uint32_t sort_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ inline float sort_value(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// By one warp: the digit that value `rank` of those counted has, and its rank among the values with that
// digit.
__device__ inline void find_digit(uint32_t rank, SelectScratch& scratch) {
  constexpr int32_t kEach = kDigits / 32;
  const int32_t lane = threadIdx.x % 32;
  uint32_t sum = 0;
  for (int32_t i = 0; i < kEach; ++i) sum += scratch.totals[lane * kEach + i];
  uint32_t before = sum;
  for (int32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t lower = __shfl_up_sync(kWholeWarp, before, offset);
    if (lane >= offset) before += lower;
  }
  before -= sum;
  if (rank < before || rank >= before + sum) return;  // in another lane's digits
  int32_t digit = lane * kEach;
  for (rank -= before; rank >= scratch.totals[digit]; ++digit) rank -= scratch.totals[digit];
  scratch.digit = digit;
  scratch.rank = rank;
}

// sort(values)[rank]; NaN if a value is NaN or its magnitude is above `largest`. The values are read from
// global memory once for each of four digits, most significant first: up to 64 thousand of them lie in the L2
// cache, and holding them in shared memory would cost every block of the grid that memory, and so its
// neighbours.
__device__ inline float select(const float* values, int32_t n, uint32_t rank, float largest,
                               SelectScratch& scratch) {
  uint32_t key = 0;
  bool wrong = false;
  for (int32_t shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int32_t i = threadIdx.x; i < kDigits * 32; i += kThreads) scratch.counts[i / 32][i % 32] = 0;
    __syncthreads();
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < n; i += kThreads) {
      const float value = values[i];
      const uint32_t other = sort_key(value);
      wrong |= !(fabsf(value) <= largest);
      if (static_cast<uint64_t>(key ^ other) >> (shift + kDigitBits) == 0)
        atomicAdd(&scratch.counts[(other >> shift) % kDigits][threadIdx.x % 32], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kDigits) {
      uint32_t total = 0;
      for (int32_t i = 0; i < 32; ++i) total += scratch.counts[threadIdx.x][(threadIdx.x + i) % 32];
      scratch.totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(rank, scratch);
    __syncthreads();
    key |= scratch.digit << shift;
    rank = scratch.rank;
  }
  return __syncthreads_or(wrong) ? NAN : sort_value(key);
}

}  // namespace fastprune::cuda
