// What both directions of a penalty on Gram matrices share: how filters are read and centred, and lie in
// shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decorrelation_gram.h"
#include "mma.cuh"
#include "reduce.cuh"
#include "tasks.cuh"
#include "vector.cuh"

namespace fastprune::cuda::gram {

// How weights and gradients are stored: as the accumulator's type, or in 16 bits.
enum class Storage : int32_t { wide, bfloat16, float16 };

// The arguments beside the table of layers; pointers into the scratch memory last.
struct Call {
  bool correlation;
  bool diagonal;  // of a covariance
  Storage storage;
  int32_t layers;      // of the model
  const bool* mask;    // [N] or null
  void* coefficients;  // read backward
  void* scalar;        // the penalty, or the incoming gradient
  uint32_t* next;      // task of this launch
  uint32_t* finished;  // layers
  uint32_t* progress;  // [layers, 2]: means taken, tiles finished
  void* scales;        // [N] of Scale
  double2* parts;      // [N], at each first of kMeasured: sum of squared correlations, kept filters
  double* slots;
  double* penalties;  // [layers]
};

// A filter w takes part as (w − mean) · inverse, and not at all where `inverse` is 0.
template <class A>
struct alignas(2 * sizeof(A)) Scale {
  A mean, inverse;
};

// A vector of weights as it was read.
template <class A>
using Raw = Vector<uint32_t, 4>;

// One access of 16 bytes of shared memory.
template <class A, class V>
__device__ void put16(A* to, const V& vector) {
  uint4 word;
  memcpy(&word, &vector, sizeof(word));
  *reinterpret_cast<uint4*>(to) = word;
}
template <class A, class V>
__device__ void get16(const A* from, V& vector) {
  const uint4 word = *reinterpret_cast<const uint4*>(from);
  memcpy(&vector, &word, sizeof(word));
}

// kVector elements of a row of `size` from k on, zeros past its end. `whole`: the row's vectors are aligned,
// and the last one ends with it.
template <class A>
__device__ Raw<A> load_wide(const A* row, int64_t k, int64_t size, bool whole) {
  Raw<A> raw{};
  if (whole) {
    if (k < size) raw = load<4>(reinterpret_cast<const uint32_t*>(row + k));
    return raw;
  }
  A elements[kVector<A>] = {};
#pragma unroll
  for (int32_t i = 0; i < kVector<A>; ++i)
    if (k + i < size) elements[i] = __ldg(row + k + i);
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

// The same of 16-bit elements, in the first half of what is returned.
template <class A>
__device__ Raw<A> load_half(const uint16_t* row, int64_t k, int64_t size, bool whole) {
  Raw<A> raw{};
  if (whole) {
    if (k < size) {
      const auto words = load<2>(reinterpret_cast<const uint32_t*>(row + k));
      raw.x[0] = words.x[0];
      raw.x[1] = words.x[1];
    }
    return raw;
  }
#pragma unroll
  for (int32_t i = 0; i < 4; ++i)
    if (k + i < size) raw.x[i / 2] |= uint32_t{__ldg(row + k + i)} << 16 * (i % 2);
  return raw;
}

template <class A>
__device__ Raw<A> load_raw(const Layer& layer, Storage storage, int64_t row, int64_t k) {
  if (sizeof(A) == 8 || storage == Storage::wide)
    return load_wide(static_cast<const A*>(layer.in) + row * layer.size, k, layer.size, layer.aligned);
  return load_half<A>(static_cast<const uint16_t*>(layer.in) + row * layer.size, k, layer.size,
                      layer.aligned);
}

template <class A>
__device__ void widen(const Raw<A>& raw, Storage storage, A (&x)[kVector<A>]) {
  memcpy(x, &raw, sizeof(x));
  if constexpr (sizeof(A) == 4) {
    if (storage == Storage::wide) return;
#pragma unroll
    for (int32_t i = 0; i < kVector<A>; ++i) {
      const uint16_t bits = static_cast<uint16_t>(raw.x[i / 2] >> 16 * (i % 2));
      x[i] = storage == Storage::bfloat16 ? __uint_as_float(uint32_t{bits} << 16)
                                          : __half2float(__ushort_as_half(bits));
    }
  }
}

// A vector of a centred row as it is multiplied; zeros past its end, and of a filter that takes no part.
template <class A>
__device__ Vector<A, kVector<A>> centred(const Raw<A>& raw, Storage storage, const Scale<A>& scale,
                                         int64_t left) {
  Vector<A, kVector<A>> vector;
  widen<A>(raw, storage, vector.x);
#pragma unroll
  for (int32_t i = 0; i < kVector<A>; ++i)
    vector.x[i] = i < left && scale.inverse != A(0) ? (vector.x[i] - scale.mean) * scale.inverse : A(0);
  return vector;
}

// Rows in shared memory, whose depth is cut into strips of four vectors (64 bytes). A row more than there are
// lies between strips, so that neither the threads that write a row nor the lanes that read eight of them
// meet in a bank.
template <class A, int32_t Rows, int32_t Strips>
struct Panel {
  static constexpr int32_t kStrip = 4 * kVector<A>;  // elements of a row's part
  static constexpr int32_t kDepth = Strips * kStrip;
  static constexpr int32_t kCount = Rows;
  static constexpr int32_t kStrips = Strips;
  static constexpr int32_t kRowVectors = 4 * Strips;
  static constexpr int32_t kEach = Rows * kRowVectors / kBlock;  // vectors a thread moves
  static constexpr int32_t kStep = kBlock / kRowVectors;         // rows between them
  alignas(16) A x[Strips][Rows + 1][kStrip];

  __device__ A* vector(int32_t row, int32_t index) { return &x[index / 4][row][index % 4 * kVector<A>]; }
  __device__ const A* operand(int32_t strip, int32_t row, int32_t lane) const {
    return &x[strip][row + lane / 4][lane % 4 * kVector<A>];
  }
  // This lane's part of 32 rows from `row` on, as a left operand.
  __device__ void read_left(int32_t strip, int32_t row, int32_t lane, Operands<A>& to) const {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) get16(operand(strip, row + 8 * i, lane), to.left[i / 2][i % 2]);
  }
  // The same as a right operand, whose columns these rows are.
  __device__ void read_right(int32_t strip, int32_t row, int32_t lane, Operands<A>& to) const {
#pragma unroll
    for (int32_t f = 0; f < 4; ++f) {
      A part[kVector<A>];
      get16(operand(strip, row + 8 * f, lane), part);
#pragma unroll
      for (int32_t d = 0; d < kVector<A>; ++d) to.right[d][f] = part[d];
    }
  }
};

// The length of a row of packed signs.
__device__ inline int64_t words_of(const Layer& layer) {
  return (layer.filters + kEntriesPerWord - 1) / kEntriesPerWord;
}

// The sum over the block, in all threads; `shared` has room for a double of every warp.
__device__ inline double sum_block(double x, double* shared) {
  x = sum_lanes(x, kWarpShift);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int32_t warp = 0; warp < kBlock / 32; ++warp) total += shared[warp];
  return total;
}

// The layer of a task, by binary search among the first ones.
__device__ inline int32_t layer_of(const Table& table, int32_t task, int32_t Layer::* first) {
  int32_t low = 0, high = table.count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (table.layers[middle].*first <= task)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Another part of the work that `progress` counts is done; wait_for waits for a number of them.
__device__ inline void report(uint32_t* progress) {
  __threadfence();  // what this thread wrote comes before the block's report
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(progress, 1u);
}

// The sum of f(element) over a row, in all lanes of a warp.
template <class A, class F>
__device__ double sum_row(const Layer& layer, Storage storage, int64_t row, int32_t lane, const F& f) {
  double sums[kVector<A>] = {};
#pragma unroll 4
  for (int64_t k = lane * kVector<A>; k < layer.size; k += 32 * kVector<A>) {
    A x[kVector<A>];
    widen<A>(load_raw<A>(layer, storage, row, k), storage, x);
#pragma unroll
    for (int32_t i = 0; i < kVector<A>; ++i)
      if (k + i < layer.size) sums[i] += f(static_cast<double>(x[i]));
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return sum_lanes(total, kWarpShift);
}

// The mean of a filter in two exact passes; for a correlation 1 / ‖w − mean‖, 0 for a constant filter.
template <class A>
__device__ Scale<A> measure_row(const Layer& layer, const Call& call, int64_t row, int32_t lane) {
  const double mean = sum_row<A>(layer, call.storage, row, lane, [](double x) { return x; }) /
                      static_cast<double>(layer.size);
  if (!call.correlation) return {static_cast<A>(mean), A(1)};
  const double centred =
      sum_row<A>(layer, call.storage, row, lane, [mean](double x) { return (x - mean) * (x - mean); });
  const double squares = centred + static_cast<double>(layer.size) * mean * mean;
  const bool constant = centred <= kConstantFilter * kConstantFilter * squares;
  return {static_cast<A>(mean), constant ? A(0) : static_cast<A>(1 / sqrt(centred))};
}

// Means and scales of kMeasured filters from `first` on, a warp to a filter; backward, the sum of their
// squared correlations, which is on the diagonal of the coefficients, and their number.
template <class A>
__device__ void measure(const Layer& layer, const Call& call, int32_t first, bool backward, double* shared) {
  const int32_t lane = threadIdx.x % 32;
  double squares = 0, kept = 0;
  for (int32_t row = first + threadIdx.x / 32; row < min(first + kMeasured, layer.filters);
       row += kBlock / 32) {
    Scale<A> scale{};
    if (call.mask == nullptr || call.mask[layer.first + row]) {
      scale = measure_row<A>(layer, call, row, lane);
      kept += 1;
      if (backward && call.correlation)
        squares -= static_cast<double>(static_cast<const A*>(
            call.coefficients)[layer.coefficients + static_cast<int64_t>(row) * (layer.filters + 1)]);
    }
    if (lane == 0) static_cast<Scale<A>*>(call.scales)[layer.first + row] = scale;
  }
  if (!backward) return;
  squares = sum_block(lane == 0 ? squares : 0, shared);
  kept = sum_block(lane == 0 ? kept : 0, shared);
  if (threadIdx.x == 0) call.parts[layer.first + first] = {squares, kept};
}

}  // namespace fastprune::cuda::gram
