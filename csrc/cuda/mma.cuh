// Products of small matrices by a warp's tensor cores: 32 x 32 results, as many deep as 16-byte vectors of
// the accumulator's type have elements, times four.
//
// Of the 32 lanes, lane 4g + t has of the left operand rows g, g + 8, g + 16 and g + 24, of the right one
// column g of four groups of eight, and of both a vector of the depth; which of the depth's elements lie in
// the vector of which t is free, as long as both operands agree.
#pragma once

#include <cstdint>

#include "../decorrelation.h"

namespace fastprune::cuda {

template <class A>
inline constexpr int32_t kVector = 16 / static_cast<int32_t>(sizeof(A));

template <class A>
struct Operands {
  A left[2][2][kVector<A>];  // rows 16m + 8h + g
  A right[kVector<A>][4];    // columns 8f + g
};

// Row 16m + 8h + g and column 8f + 2t + e are at [m][f][2h + e].
template <class A>
using Results = A[2][4][4];

__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Two values rounded to bfloat16, the first in the low half.
__device__ inline uint32_t to_bfloat16s(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ inline void mma_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ inline void mma_bfloat16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ inline void mma_float64(double& low, double& high, double left, double right) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(low), "+d"(high)
      : "d"(left), "d"(right));
}

// sums += left · right in float64.
template <Precision P>
__device__ void multiply(const Operands<double>& x, bool, Results<double>& sums) {
#pragma unroll
  for (int32_t k = 0; k < 2; ++k)
#pragma unroll
    for (int32_t m = 0; m < 2; ++m)
#pragma unroll
      for (int32_t f = 0; f < 4; ++f)
#pragma unroll
        for (int32_t h = 0; h < 2; ++h)
          mma_float64(sums[m][f][2 * h], sums[m][f][2 * h + 1], x.left[m][h][k], x.right[k][f]);
}

// A float32 as the sum of two TF32 values, up to 2^-22 of it.
struct Split {
  uint32_t high, low;
  __device__ explicit Split(float x) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
  }
};

// Two of each lane's vector of the right operand, from k on: eight of the depth's elements.
struct SplitColumns {
  uint32_t high[4][2], low[4][2];
  __device__ SplitColumns(const Operands<float>& x, int32_t k) {
#pragma unroll
    for (int32_t f = 0; f < 4; ++f)
#pragma unroll
      for (int32_t d = 0; d < 2; ++d) {
        const Split split(x.right[k + d][f]);
        high[f][d] = split.high;
        low[f][d] = split.low;
      }
  }
};

// The same of 16 rows of the left operand times these columns. Exact: products of high and low parts, too,
// the small ones first; of a left operand that has no low part, those are left out.
template <bool Exact>
__device__ void multiply_tf32(const float (&left)[2][4], int32_t k, const SplitColumns& right, bool left_low,
                              float (&sums)[4][4]) {
  uint32_t high[4], low[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const Split split(left[i % 2][k + i / 2]);
    high[i] = split.high;
    low[i] = split.low;
  }
  if (Exact && left_low) {
#pragma unroll
    for (int32_t f = 0; f < 4; ++f) mma_tf32(sums[f], low, right.high[f]);
  }
  if (Exact) {
#pragma unroll
    for (int32_t f = 0; f < 4; ++f) mma_tf32(sums[f], high, right.low[f]);
  }
#pragma unroll
  for (int32_t f = 0; f < 4; ++f) mma_tf32(sums[f], high, right.high[f]);
}

// sums += left · right; `left_low`: whether the left operand has more bits than TF32. In highest precision
// the tensor cores add up only what is here, and their sums are added in float32: they cut off what does not
// fit their accumulators, always towards 0.
template <Precision P>
__device__ void multiply(const Operands<float>& x, bool left_low, Results<float>& sums) {
  if constexpr (P == Precision::medium) {
    uint32_t left[2][4], right[4][2];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t m = 0; m < 2; ++m)
        left[m][i] = to_bfloat16s(x.left[m][i % 2][i / 2 * 2], x.left[m][i % 2][i / 2 * 2 + 1]);
#pragma unroll
      for (int32_t d = 0; d < 2; ++d) right[i][d] = to_bfloat16s(x.right[2 * d][i], x.right[2 * d + 1][i]);
    }
#pragma unroll
    for (int32_t m = 0; m < 2; ++m)
#pragma unroll
      for (int32_t f = 0; f < 4; ++f) mma_bfloat16(sums[m][f], left[m], right[f]);
  } else {
#pragma unroll
    for (int32_t k = 0; k < 4; k += 2) {
      const SplitColumns right(x, k);
#pragma unroll
      for (int32_t m = 0; m < 2; ++m) {
        if constexpr (P == Precision::high) {
          multiply_tf32<false>(x.left[m], k, right, true, sums[m]);
        } else {
          float part[4][4] = {};
          multiply_tf32<true>(x.left[m], k, right, left_low, part);
#pragma unroll
          for (int32_t i = 0; i < 16; ++i) sums[m][i / 4][i % 4] += part[i / 4][i % 4];
        }
      }
    }
  }
}

}  // namespace fastprune::cuda
