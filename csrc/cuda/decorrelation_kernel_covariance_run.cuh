// The slices of a block: from global memory into shared memory, and the gradient back.
#pragma once

#include "decorrelation_kernel_covariance.h"
#include "vector.cuh"

namespace fastprune::cuda::kernel_covariance {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int32_t kWidth = sizeof(T) == 8 ? 2 : 4;

template <class A>
struct Tile {
  static constexpr int32_t kSize = kTileBytes / sizeof(A);
  alignas(16) A x[kSize];
  bool kept[kSize / 4 + 2];  // by filter, from the block's first on
};

// A block's run of slices, and what it knows of their filters.
struct Run {
  const Layer& layer;
  int64_t first;     // slice of the layer
  int32_t count;     // of slices
  int32_t elements;  // of a slice
  int32_t filter;    // that of the first slice
  int32_t before;    // slices of that filter before the first
  const bool* kept;  // null: all are

  __device__ bool takes_part(int32_t slice) const {
    return kept == nullptr || kept[(before + slice) / layer.channels];
  }
  // The place of a slice of its own in a layer that is not one run.
  __device__ int64_t place(int32_t slice) const {
    const int32_t in_filter = before + slice;
    return static_cast<int64_t>(filter + in_filter / layer.channels) * layer.channels * elements +
           static_cast<int64_t>(in_filter % layer.channels) * layer.strides[0];
  }
};

template <class A>
__device__ Run run_of(const Layer& layer, int32_t block, const bool* mask, Tile<A>& tile) {
  const int64_t first = static_cast<int64_t>(block) * layer.per_block;
  const int64_t left = static_cast<int64_t>(layer.filters) * layer.channels - first;
  const int32_t count = static_cast<int32_t>(left < layer.per_block ? left : layer.per_block);
  const int32_t filter = static_cast<int32_t>(first / layer.channels);
  const int32_t before = static_cast<int32_t>(first % layer.channels);
  if (mask != nullptr) {
    const int32_t filters = (before + count - 1) / layer.channels + 1;
    for (int32_t i = threadIdx.x; i < filters; i += kThreads) tile.kept[i] = mask[layer.first + filter + i];
    __syncthreads();
  }
  return {layer, first, count, layer.kh * layer.kw, filter, before, mask ? tile.kept : nullptr};
}

// The tile's elements from a layer that is one run, as vectors; those of pruned filters are not read, but for
// what a vector shares with a kept one.
template <class T>
__device__ void read_run(const Run& run, Accumulator<T>* tile) {
  const T* from = static_cast<const T*>(run.layer.in) + run.first * run.elements;
  const int32_t size = run.count * run.elements;
#pragma unroll 4
  for (int32_t e = threadIdx.x * kWidth<T>; e < size; e += kThreads * kWidth<T>) {
    const int32_t last = min(e + kWidth<T>, size) - 1;
    if (run.kept && !run.takes_part(e / run.elements) && !run.takes_part(last / run.elements)) continue;
    Vector<Accumulator<T>, kWidth<T>> to{};
    if (run.layer.aligned && e + kWidth<T> <= size) {
      const auto vector = load<kWidth<T>>(from + e);
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) to.x[i] = widen(vector.x[i]);
    } else {
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i)
        if (e + i < size) to.x[i] = widen(__ldg(from + e + i));
    }
    *reinterpret_cast<Vector<Accumulator<T>, kWidth<T>>*>(tile + e) = to;
  }
}

template <class T>
__device__ void write_run(const Run& run, const Accumulator<T>* tile) {
  T* out = static_cast<T*>(run.layer.out) + run.first * run.elements;
  const int32_t size = run.count * run.elements;
#pragma unroll 4
  for (int32_t e = threadIdx.x * kWidth<T>; e < size; e += kThreads * kWidth<T>) {
    if (run.layer.aligned && e + kWidth<T> <= size) {
      const auto from = *reinterpret_cast<const Vector<Accumulator<T>, kWidth<T>>*>(tile + e);
      Vector<T, kWidth<T>> to;
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) to.x[i] = narrow<T>(from.x[i]);
      store(out + e, to);
    } else {
      for (int32_t i = e; i < min(e + kWidth<T>, size); ++i) out[i] = narrow<T>(tile[i]);
    }
  }
}

// Calls f(slice of the tile, offset) for the elements of a slice, in the order of [kh, kw].
template <int32_t Size, class F>
__device__ void for_elements(const Layer& layer, const F& f) {
  constexpr int32_t kUnroll = Size ? Size : 1;
  const int32_t kh = Size ? Size : layer.kh, kw = Size ? Size : layer.kw;
#pragma unroll kUnroll
  for (int32_t y = 0; y < kh; ++y)
#pragma unroll kUnroll
    for (int32_t x = 0; x < kw; ++x)
      f(y * kw + x, static_cast<int64_t>(y) * layer.strides[1] + static_cast<int64_t>(x) * layer.strides[2]);
}

// Calls f(slice in the tile, index) for the slices of this thread that take part; all have been read.
template <class T, int32_t Size, class F>
__device__ void for_slices(const Run& run, Accumulator<T>* tile, const F& f) {
  const bool dense = run.layer.way == Way::dense;
  if (dense) {
    read_run<T>(run, tile);
    __syncthreads();
  }
  for (int32_t i = threadIdx.x; i < run.count; i += kThreads) {
    Accumulator<T>* slice = tile + i * run.elements;
    const bool kept = run.takes_part(i);
    if (kept && !dense) {
      const T* from = static_cast<const T*>(run.layer.in) + run.place(i);
      for_elements<Size>(run.layer,
                         [&](int32_t e, int64_t offset) { slice[e] = widen(__ldg(from + offset)); });
    }
    f(slice, i, kept);
  }
}

template <class T>
__device__ void write_zeros(const Layer& layer, int32_t block) {
  constexpr int32_t kEach = kVectorBytes / sizeof(T);
  const int64_t all = static_cast<int64_t>(layer.filters) * layer.channels * layer.kh;
  const int64_t first = static_cast<int64_t>(block) * layer.per_block;
  T* out = static_cast<T*>(layer.out) + first;
  const int32_t size = static_cast<int32_t>(all - first < layer.per_block ? all - first : layer.per_block);
  for (int32_t e = threadIdx.x * kEach; e < size; e += kThreads * kEach) {
    if (layer.aligned && e + kEach <= size)
      store(out + e, Vector<T, kEach>{});
    else
      for (int32_t i = e; i < min(e + kEach, size); ++i) out[i] = narrow<T>(0.0f);
  }
}

}  // namespace fastprune::cuda::kernel_covariance
