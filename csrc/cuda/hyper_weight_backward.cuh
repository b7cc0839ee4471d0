// The gradients of a layer that generates weights: what a block makes of its tiles, and of all blocks' sums.
#pragma once

#include "hyper_weight.cuh"

namespace fastprune::cuda::hyper {

// What the backward writes.
template <class T>
struct Gradients {
  T *hidden, *weight, *bias;
  double* slots;      // [slots][columns]
  uint32_t* tickets;  // of each panel
};

// A block's share of one panel.
template <class T>
struct Backward {
  using A = Arithmetic<T>;
  const Geometry& g;
  const T* weight;
  const Gradients<T>& to;
  Lane lane;
  Columns<T> columns;
  bool first_panel;
  A x[kWidth<T>] = {};
  double totals[kWidth<T>] = {};

  __device__ Backward(const Geometry& geometry, const T* rows, const Gradients<T>& gradients, const A* hidden)
      : g(geometry),
        weight(rows),
        to(gradients),
        lane(g.shift),
        columns(g, blockIdx.x, lane),
        first_panel(blockIdx.x == 0) {
    if (hidden) read_columns(hidden, lane.lane, x);
  }

  // grads · hidden for the rows of a tile, and Σ grads · row.
  template <class Kind>
  __device__ void differentiate(const Tile& tile, const A* grads, Kind kind) {
    A sums[kWidth<T>] = {};
    for (int32_t first = 0; first < tile.rows; first += lane.together()) {
      const Row own = row_of(tile, lane.own(first));
      const A own_grad = own.index >= 0 ? grads[own.place] : A{0};
      int32_t row[kRows];
      Vector<T, kWidth<T>> rows[kRows];
#pragma unroll
      for (int32_t u = 0; u < kRows; ++u) {
        row[u] = lane.of(own.index, u);
        if (!columns.count) row[u] = -1;
        rows[u] = {};
        if (row[u] >= 0)
          rows[u] = load<kWidth<T>>(weight + int64_t{row[u]} * g.size + columns.first, columns.count, kind);
      }
#pragma unroll
      for (int32_t u = 0; u < kRows; ++u) {
        const A grad = lane.of(own_grad, u);
        Vector<T, kWidth<T>> products;
#pragma unroll
        for (int32_t i = 0; i < kWidth<T>; ++i) {
          sums[i] += grad * widen(rows[u].x[i]);
          products.x[i] = narrow<T>(grad * x[i]);
        }
        if (row[u] >= 0)
          store(to.weight + int64_t{row[u]} * g.size + columns.first, products, columns.count, kind);
      }
      if (first_panel && lane.owns() && own.index >= 0) to.bias[own.index] = narrow<T>(own_grad);
    }
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i) totals[i] += static_cast<double>(sums[i]);
  }

  template <class Kind>
  __device__ void clear(int32_t tile, Kind kind) const {
    for (int32_t first = 0; first < g.zero_rows; first += lane.together()) {
      const Row own = free_row_of(g, tile, lane.own(first));
#pragma unroll
      for (int32_t u = 0; u < kRows; ++u) {
        const int32_t row = lane.of(own.index, u);
        if (row >= 0 && columns.count)
          store(to.weight + int64_t{row} * g.size + columns.first, Vector<T, kWidth<T>>{}, columns.count,
                kind);
      }
      if (first_panel && lane.owns() && own.index >= 0) to.bias[own.index] = narrow<T>(A{0});
    }
  }

  // The panel's part of the gradient of `hidden`: over the threads of a block, then by the last block over
  // all. On the way the first columns of all lanes come first, then their second ones, to lie in different
  // banks.
  __device__ void reduce(int32_t slots, double (&sums)[kThreads / 32 * kColumns<T>]) const {
    const int32_t width = kWidth<T> << lane.shift, stride = static_cast<int32_t>(gridDim.x) * kColumns<T>;
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i) {
      double total = totals[i];
      for (int32_t offset = 1 << lane.shift; offset < 32; offset *= 2)
        total += __shfl_xor_sync(kWholeWarp, total, offset);
      if (lane.group == 0) sums[lane.warp * width + (i << lane.shift) + lane.lane] = total;
    }
    __syncthreads();
    double* slot = to.slots + blockIdx.x * kColumns<T>;
    for (int32_t k = threadIdx.x; k < width; k += kThreads) {
      double total = 0;
      for (int32_t warp = 0; warp < kThreads / 32; ++warp) total += sums[warp * width + k];
      slot[int64_t{blockIdx.y} * stride + k] = total;
    }
    if (!is_last_block(to.tickets + blockIdx.x, slots)) return;
    // width is a power of 2, at most the number of threads: as many of them share a column as there are.
    const int32_t k = threadIdx.x % width, parts = kThreads / width, part = threadIdx.x / width;
    double total = 0;
#pragma unroll 8
    for (int32_t block = part; block < slots; block += parts)
      total += __ldcg(slot + int64_t{block} * stride + k);
    sums[threadIdx.x] = total;
    __syncthreads();
    const int32_t own = k & ((1 << lane.shift) - 1);
    const int32_t column = blockIdx.x * kColumns<T> + own * kWidth<T> + (k >> lane.shift);
    if (part != 0 || column >= g.size) return;
    for (int32_t other = 1; other < parts; ++other) total += sums[other * width + k];
    to.hidden[column] = narrow<T>(static_cast<A>(total));
  }
};

}  // namespace fastprune::cuda::hyper
