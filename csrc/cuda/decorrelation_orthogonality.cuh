// Whole rows of one layer [F, K] by one block: W'W x from one pass over memory, and the gradient's rows.
#pragma once

#include "decorrelation_orthogonality.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace fastprune::cuda::orthogonality {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int32_t kWidth = sizeof(T) == 8 ? 2 : 4;

template <class T>
using Elements = Vector<Accumulator<T>, kWidth<T>>;

// A thread's part of a task: rows row, row + groups, ..., of which `kept` has a bit for each that counts, and
// in these the vectors lane, lane + lanes, ...
struct Share {
  int32_t row;
  int32_t groups;
  int32_t lane;
  int32_t lanes;
  uint32_t kept;
};

__device__ inline Share share_of(const Layer& layer, int32_t task, const bool* mask) {
  const int32_t groups = kThreads >> layer.shift, lanes = 1 << layer.shift;
  Share share{task * kRows * groups + static_cast<int32_t>(threadIdx.x >> layer.shift), groups,
              static_cast<int32_t>(threadIdx.x) & (lanes - 1), lanes, 0};
  for (int32_t r = 0; r < kRows; ++r) {
    const int32_t row = share.row + r * groups;
    if (row < layer.filters && (mask == nullptr || mask[layer.first + row])) share.kept |= 1u << r;
  }
  return share;
}

// Elements k.. of a row, zeros past its end.
template <bool Aligned, class T>
__device__ Elements<T> read(const T* row, int32_t k, int32_t size) {
  Elements<T> to;
  if constexpr (Aligned) {
    const auto from = load<kWidth<T>>(row + k);
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i) to.x[i] = widen(from.x[i]);
  } else {
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i)
      to.x[i] = k + i < size ? widen(__ldg(row + k + i)) : Accumulator<T>(0);
  }
  return to;
}

template <bool Aligned, class T>
__device__ void write(T* row, int32_t k, int32_t size, const Elements<T>& from) {
  Vector<T, kWidth<T>> to;
#pragma unroll
  for (int32_t i = 0; i < kWidth<T>; ++i) to.x[i] = narrow<T>(from.x[i]);
  if constexpr (Aligned) {
    store(row + k, to);
  } else {
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i)
      if (k + i < size) row[k + i] = to.x[i];
  }
}

// Sums over the lanes of a warp: of value lane / (32 / Count), in sums[0]. Every step halves the values that
// a lane still holds, so that there are about as many shuffles as values.
template <int32_t Offset, int32_t Half, int32_t Count, class A>
__device__ void sum_warp(A (&sums)[Count]) {
  const bool upper = threadIdx.x & Offset;
  if constexpr (Half == 0) sums[0] += __shfl_xor_sync(kWholeWarp, sums[0], Offset);
#pragma unroll
  for (int32_t i = 0; i < Half; ++i) {
    const A other = __shfl_xor_sync(kWholeWarp, upper ? sums[i] : sums[i + Half], Offset);
    sums[i] = (upper ? sums[i + Half] : sums[i]) + other;
  }
  if constexpr (Offset > 1) sum_warp<Offset / 2, Half / 2>(sums);
}

// Sums over the 2^shift threads of a row, in all of them.
template <int32_t Count, class A>
__device__ void sum_rows(A (&sums)[Count], int32_t shift) {
  constexpr int32_t kWarps = kThreads / 32;
  __shared__ A warps[kWarps][Count], totals[kWarps][Count];
  if (shift < kWarpShift) {
    for (int32_t offset = (1 << shift) >> 1; offset > 0; offset >>= 1)
#pragma unroll
      for (int32_t i = 0; i < Count; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], offset);
    return;
  }
  sum_warp<16, Count / 2>(sums);
  const int32_t thread = threadIdx.x, lane = thread % 32, count = 1 << (shift - kWarpShift);
  if (lane % (32 / Count) == 0) warps[thread / 32][lane / (32 / Count)] = sums[0];
  __syncthreads();
  if (thread < kWarps / count * Count) {
    A total = 0;
    for (int32_t warp = 0; warp < count; ++warp)
      total += warps[thread / Count * count + warp][thread % Count];
    totals[thread / Count][thread % Count] = total;
  }
  __syncthreads();
#pragma unroll
  for (int32_t i = 0; i < Count; ++i) sums[i] = totals[thread >> shift][i];
}

// slot = Σ w (w·x) over the task's rows.
template <bool Aligned, class T, class A>
__device__ void apply(const Layer& layer, const Share& share, const A* x, A* slot) {
  __shared__ Elements<T> columns[kThreads];
  const T* rows = static_cast<const T*>(layer.in) + static_cast<int64_t>(share.row) * layer.size;
  const int64_t step = static_cast<int64_t>(share.groups) * layer.size;
  A products[kRows] = {};
#pragma unroll 1
  for (int32_t k = share.lane * kWidth<T>; k < layer.size; k += share.lanes * kWidth<T>) {
    const Elements<T> factor = *reinterpret_cast<const Elements<T>*>(x + k);
    Elements<T> w[kRows];
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r)
      w[r] = share.kept >> r & 1 ? read<Aligned>(rows + r * step, k, layer.size) : Elements<T>{};
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r)
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) products[r] += w[r].x[i] * factor.x[i];
  }
  sum_rows(products, layer.shift);
#pragma unroll 1
  for (int32_t k = share.lane * kWidth<T>; k < layer.size; k += share.lanes * kWidth<T>) {
    Elements<T> total{};
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r) {
      if (!(share.kept >> r & 1)) continue;
      const Elements<T> w = read<Aligned>(rows + r * step, k, layer.size);
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) total.x[i] += products[r] * w.x[i];
    }
    if (share.groups == 1)
      store(slot + k, total);
    else
      columns[threadIdx.x] = total;
  }
  if (share.groups == 1) return;
  __syncthreads();
  const A* flat = columns[0].x;
  for (int32_t k = threadIdx.x; k < layer.stride; k += kThreads) {
    A total = 0;
    for (int32_t group = 0; group < share.groups; ++group) total += flat[group * share.lanes * kWidth<T> + k];
    slot[k] = total;
  }
}

// dR/dw of the task's rows: every A applied, y = A x, adds W (dy x' + x dy').
template <bool Aligned, class T, class A>
__device__ void write_rows(const Layer& layer, const Share& share, const A* vectors, A grad) {
  constexpr int32_t kVectors = 4, kHalf = kRows / 2;  // u, a, db, da; half of the rows at once
  const int64_t step = static_cast<int64_t>(share.groups) * layer.size;
  const auto vector = [&](int32_t v, int32_t k) {
    return *reinterpret_cast<const Elements<T>*>(vectors + static_cast<int64_t>(v) * layer.stride + k);
  };
  for (int32_t half = 0; half < kRows; half += kHalf) {
    const int64_t offset = static_cast<int64_t>(share.row) * layer.size + half * step;
    const T* rows = static_cast<const T*>(layer.in) + offset;
    T* out = static_cast<T*>(layer.out) + offset;
    A products[kHalf * kVectors] = {};
#pragma unroll 1
    for (int32_t k = share.lane * kWidth<T>; k < layer.size; k += share.lanes * kWidth<T>) {
      Elements<T> w[kHalf];
#pragma unroll
      for (int32_t r = 0; r < kHalf; ++r)
        w[r] = share.kept >> (half + r) & 1 ? read<Aligned>(rows + r * step, k, layer.size) : Elements<T>{};
#pragma unroll
      for (int32_t v = 0; v < kVectors; ++v) {
        const Elements<T> factor = vector(v, k);
#pragma unroll
        for (int32_t r = 0; r < kHalf; ++r)
#pragma unroll
          for (int32_t i = 0; i < kWidth<T>; ++i) products[v * kHalf + r] += w[r].x[i] * factor.x[i];
      }
    }
    sum_rows(products, layer.shift);
#pragma unroll 1
    for (int32_t k = share.lane * kWidth<T>; k < layer.size; k += share.lanes * kWidth<T>) {
      const Elements<T> u = vector(0, k), a = vector(1, k), db = vector(2, k), da = vector(3, k);
#pragma unroll
      for (int32_t r = 0; r < kHalf; ++r) {
        if (share.row + (half + r) * share.groups >= layer.filters) continue;
        Elements<T> to{};
        if (share.kept >> (half + r) & 1)
#pragma unroll
          for (int32_t i = 0; i < kWidth<T>; ++i)
            to.x[i] = grad * (products[2 * kHalf + r] * a.x[i] + products[kHalf + r] * db.x[i] +
                              products[3 * kHalf + r] * u.x[i] + products[r] * da.x[i]);
        write<Aligned>(out + r * step, k, layer.size, to);
      }
    }
  }
}

}  // namespace fastprune::cuda::orthogonality
