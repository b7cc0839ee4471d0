// The rows of a tile, by the threads of a block: which rows these are, and how several threads share one.
#pragma once

#include "hyper_weight.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace fastprune::cuda::hyper {

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int32_t kWidth = kVectorBytes / sizeof(T);

template <class T>
constexpr int32_t kColumns = kPanelVectors * kWidth<T>;  // of a panel

__device__ inline int32_t quotient(int32_t n, const Divisor& by) {
  return static_cast<int32_t>((__umulhi(static_cast<uint32_t>(n), by.multiplier) + n) >> by.shift);
}

// The windows of some taps of a filter, and in the order of the layer the rows that generate them. In shared
// memory the t-th window has places t · pitch .. by channels, wherever it begins.
struct Tile {
  const Geometry& g;
  int32_t filter, first_tap;
  int32_t begin;          // of the windows, in lines that begin on a sector
  int32_t first_channel;  // or element of the one line
  int32_t rows;           // some of which may belong to neighbouring tiles

  __device__ Tile(const Geometry& geometry, int32_t index) : g(geometry) {
    const int32_t group = index / g.windows;
    begin = index % g.windows * g.window;
    filter = group / g.tap_groups;
    first_tap = group % g.tap_groups * g.tile_taps;
    first_channel = max(begin - g.slack, 0);
    rows = (min(g.length, begin + g.window) - first_channel) * g.tile_taps;
  }

  __device__ int32_t line(int32_t tap) const { return (filter * g.taps + tap) * g.length; }
  __device__ int32_t window_of(int32_t tap) const { return begin - (line(tap) & g.slack); }

  __device__ int32_t place(int32_t t, int32_t channel) const {
    return t * g.pitch + channel - begin + g.slack;
  }

  // Calls f(element, place) for what this thread has of the windows: where it lies in the tensor, and where
  // in shared memory. A warp's elements begin on a sector.
  template <class F>
  __device__ void for_elements(const F& f) const {
    const int32_t before = (line(first_tap) + window_of(first_tap)) & (kSector - 1);
    for (int32_t p = static_cast<int32_t>(threadIdx.x) - before; p < g.tile_taps * g.window; p += kThreads) {
      if (p < 0) continue;
      const int32_t t = quotient(p, g.by_window), j = p - t * g.window, tap = first_tap + t;
      const int32_t channel = window_of(tap) + j;
      if (tap < g.taps && channel >= 0 && channel < g.length) f(line(tap) + channel, place(t, channel));
    }
  }
};

// A row of the layer and the place in shared memory of what it generates; -1 if there is none.
struct Row {
  int32_t index = -1, place = 0;
};

__device__ inline Row row_of(const Tile& tile, int32_t q) {
  const Geometry& g = tile.g;
  if (q >= tile.rows) return {};
  const int32_t c = quotient(q, g.by_tile_taps), t = q - c * g.tile_taps;
  const int32_t channel = tile.first_channel + c, tap = tile.first_tap + t;
  const int32_t j = channel - tile.window_of(tap);
  if (tap >= g.taps || j < 0 || j >= g.window) return {};
  const int32_t filters = quotient(channel, g.by_run), rest = channel - filters * g.by_run.divisor;
  return {(tile.filter + filters) * g.filter_rows + rest * g.taps + tap, tile.place(t, channel)};
}

// A row that gets zeros.
__device__ inline Row free_row_of(const Geometry& g, int32_t tile, int32_t q) {
  const int32_t free = tile * g.zero_rows + q;
  if (q >= g.zero_rows || free >= g.free_rows) return {};
  if (free >= g.gaps) return {g.first_free + free - g.gaps};
  const int32_t filter = quotient(free, g.by_gap);
  return {filter * g.filter_rows + g.run + free - filter * g.gap};
}

// A thread among those of its warp: 2^shift share a row, and a warp works on kRows times as many neighbouring
// rows as it has such groups. Lane u of a group knows the u-th of its rows.
struct Lane {
  int32_t shift, lane, group, groups, warp;

  __device__ explicit Lane(int32_t of_row)
      : shift(of_row),
        lane(threadIdx.x & ((1 << of_row) - 1)),
        group((threadIdx.x & 31) >> of_row),
        groups(32 >> of_row),
        warp(threadIdx.x >> kWarpShift) {}

  __device__ bool owns() const { return lane < kRows; }
  __device__ int32_t own(int32_t first) const {
    return first + (warp * kRows + lane % kRows) * groups + group;
  }
  __device__ int32_t together() const { return (kThreads >> kWarpShift) * kRows * groups; }

  // What lane u of the group has.
  template <class V>
  __device__ V of(V value, int32_t u) const {
    return __shfl_sync(kWholeWarp, value, u, 1 << shift);
  }

  // In lane u of the group, the sum of x[u] over its lanes.
  template <class A>
  __device__ A sum(const A (&x)[kRows]) const {
    static_assert(kRows == 4);
    const bool odd = lane & 1, upper = lane & 2;
    const A low = (odd ? x[1] : x[0]) + __shfl_xor_sync(kWholeWarp, odd ? x[0] : x[1], 1);
    const A high = (odd ? x[3] : x[2]) + __shfl_xor_sync(kWholeWarp, odd ? x[2] : x[3], 1);
    A total = (upper ? high : low) + __shfl_xor_sync(kWholeWarp, upper ? low : high, 2);
    for (int32_t offset = kRows; offset < 1 << shift; offset *= 2)
      total += __shfl_xor_sync(kWholeWarp, total, offset);
    return total;
  }
};

// The part of a row that a thread has of a panel.
template <class T>
struct Columns {
  int32_t first, count;  // count 0: none

  __device__ Columns(const Geometry& g, int32_t panel, const Lane& lane)
      : first((panel * kPanelVectors + lane.lane) * kWidth<T>), count(0) {
    if (lane.lane < kPanelVectors && first < g.size) count = up_to<kWidth<T>>(g.size - first);
  }
};

// A thread's columns of a vector in shared memory.
template <class A, int32_t Width>
__device__ void read_columns(const A* vector, int32_t lane, A (&x)[Width]) {
  const auto* parts = reinterpret_cast<const uint4*>(vector + lane * Width);
#pragma unroll
  for (int32_t i = 0; i < static_cast<int32_t>(sizeof(x) / sizeof(uint4)); ++i)
    memcpy(reinterpret_cast<char*>(x) + i * sizeof(uint4), &parts[i], sizeof(uint4));
}

// `hidden`'s columns of a panel, in the type of arithmetic, with zeros behind its end. All threads call this.
template <class T>
__device__ void stage_panel(const Geometry& g, const T* hidden, int32_t panel, Arithmetic<T>* staged) {
  for (int32_t k = threadIdx.x; k < kColumns<T>; k += kThreads) {
    const int32_t column = panel * kColumns<T> + k;
    staged[k] = column < g.size ? widen(__ldg(hidden + column)) : Arithmetic<T>{0};
  }
}

}  // namespace fastprune::cuda::hyper
