// The mean of |w| or w² over a filter, by the threads that work on it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "reduce.cuh"
#include "vector.cuh"

namespace fastprune::cuda {

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

// One thread's part of Σ |w| or Σ w² over a filter. It takes vector `lane`, and every lanes-th from there:
// which elements these are depends only on the filter's size, not on how it lies in memory, and so equal
// weights have equal norms, bit by bit, in every kernel.
template <class Sum, int Width>
struct NormPart {
  Sum sums[2];  // so that additions wait less for each other

  // The first `count` elements of a vector, or of an even part of it.
  template <int Ord, class T, int Part>
  __device__ void add(const Vector<T, Part>& vector, int32_t count = Part) {
#pragma unroll
    for (int32_t i = 0; i < Part; ++i) {
      if (i >= count) continue;
      if constexpr (Ord == 1)
        sums[i % 2].add(fabs(widen(vector.x[i])));
      else
        sums[i % 2].add_square(widen(vector.x[i]));
    }
  }
  __device__ double value() const { return sums[0].value() + sums[1].value(); }
};

template <int Ord, class Sum, Access From, class T>
__device__ double norm_part(const T* row, int64_t size, bool aligned, int32_t lane, int32_t lanes) {
  constexpr int32_t kWidth = kVectorBytes / sizeof(T);
  NormPart<Sum, kWidth> part;
  if (aligned) {
    // Not the second, rare way of summing: it would cost registers.
    constexpr int32_t kUnroll = std::is_same_v<Sum, SumOf<T>> ? 4 : 1;
#pragma unroll kUnroll
    for (int64_t k = lane * kWidth; k < size; k += lanes * kWidth)
      part.template add<Ord>(load<kWidth, From>(row + k));
  } else {
    constexpr int32_t kPart = kWidth < 4 ? kWidth : 4;  // all eight of 16 bits would cost registers, too
    for (int64_t k = lane * kWidth; k < size; k += lanes * kWidth) {
      const int32_t count = up_to<kWidth>(size - k);
#pragma unroll 1
      for (int32_t i = 0; i < count; i += kPart)
        part.template add<Ord>(load<kPart, From>(row + k + i, count - i, Elements{}), count - i);
    }
  }
  return part.value();
}

// From the parts of all threads of a filter, in all of them. Every thread of the block calls this.
__device__ inline float mean(double part, const Place& place) {
  return static_cast<float>(sum_threads(part, place.layer.shift) / static_cast<double>(place.layer.size));
}

// Every thread of the block calls this, those without a filter with a size of 0.
template <class Sum, Access From, class T>
__device__ float norm_of(const T* row, int64_t size, const Place& place, int32_t ord) {
  const bool aligned = place.layer.aligned;
  const double part = ord == 1 ? norm_part<1, Sum, From>(row, size, aligned, place.lane, place.lanes)
                               : norm_part<2, Sum, From>(row, size, aligned, place.lane, place.lanes);
  return mean(part, place);
}

// The norm, or where that is not finite in float32, as it is in float64: the mean may be finite where the sum
// is too large. All threads take part, whoever asked.
template <Access From, class T>
__device__ float finite_norm(float norm, const T* row, int64_t size, const Place& place, int32_t ord) {
  if (!std::is_same_v<T, double> && __syncthreads_or(!isfinite(norm))) {
    const float wider = norm_of<DoubleSum, From>(row, size, place, ord);
    if (!isfinite(norm)) norm = wider;
  }
  return norm;
}

}  // namespace fastprune::cuda
