// A tile of a layer's gradient: scale · (coefficients) · (centred filters).
#pragma once

#include "gram.cuh"

namespace fastprune::cuda::gram {

// A tile is `kRows` filters by `kColumns` of their elements, its depth all filters: the left operand are rows
// of coefficients, the right one filters, each a row of shared memory.
template <class A, bool Small>
struct BackwardTile {
  static constexpr int32_t kRows = Small ? kSmallTile : kLargeTile;
  static constexpr int32_t kColumns = gradient_columns(Small);
  static constexpr int32_t kPad = 32 / sizeof(A);  // lanes that read four rows find them in different banks
  static constexpr int32_t kRowVectors = kColumns / kVector<A>;  // of a filter
  static constexpr int32_t kStep = kBlock / kRowVectors;
  static constexpr int32_t kStrips = Small ? 1 : 2;
  using Left = Panel<A, kRows, kStrips>;
  static constexpr int32_t kDepth = Left::kDepth;
  static constexpr int32_t kEach = kDepth / kStep;
  Left left;
  alignas(16) A right[kDepth][kColumns + kPad];
};

template <class A>
struct BackwardShared {
  union {
    BackwardTile<A, false> large[2];
    BackwardTile<A, true> small[2];
  };
  double sums[kBlock / 32];
  __device__ BackwardShared() {}
};

// The factor of all rows of a layer's gradient: grad / (K − 1), or 2 · grad / (‖P − diag P‖_F · n).
template <class A>
__device__ double gradient_factor(const Layer& layer, const Call& call, double* shared) {
  const double grad = static_cast<double>(*static_cast<const A*>(call.scalar));
  if (!call.correlation) return layer.size > 1 ? grad / static_cast<double>(layer.size - 1) : 0;
  double squares = 0, kept = 0;
  const uint32_t end = layer.first + layer.filters;
  for (uint32_t i = layer.first + threadIdx.x * kMeasured; i < end; i += kBlock * kMeasured) {
    squares += call.parts[i].x;
    kept += call.parts[i].y;
  }
  squares = sum_block(squares, shared);
  kept = sum_block(kept, shared);
  return squares > 0 ? 2 * grad / (sqrt(squares) * kept) : 0;
}

// Coefficients on their way to shared memory, as a left operand.
template <class A, class Side>
struct MovingCoefficients {
  Raw<A> raw[Side::kEach];  // of correlations
  uint32_t word;            // of signs: one strip's, of one row
  int32_t first;            // filter
  uint32_t thread;

  // A thread's row and strip of signs.
  __device__ int32_t row() const { return thread / Side::kStrips; }
  __device__ int32_t strip() const { return thread % Side::kStrips; }

  __device__ void load(const Layer& layer, const Call& call, int32_t depth) {
    if (call.correlation) {
      const A* coefficients = static_cast<const A*>(call.coefficients) + layer.coefficients;
      const int64_t size = layer.filters;
      const bool whole = size % kVector<A> == 0 && reinterpret_cast<uintptr_t>(coefficients) % 16 == 0;
#pragma unroll
      for (int32_t i = 0; i < Side::kEach; ++i) {
        const int64_t filter = first + thread / Side::kRowVectors + i * Side::kStep;
        const int64_t column = depth + thread % Side::kRowVectors * kVector<A>;
        raw[i] = {};
        if (filter < size) raw[i] = load_wide(coefficients + filter * size, column, size, whole);
      }
    } else {
      const uint32_t* coefficients = static_cast<const uint32_t*>(call.coefficients) + layer.coefficients;
      const int64_t length = words_of(layer), filter = first + row();
      const int32_t entry = depth + strip() * Side::kStrip;
      word = 0;
      if (row() < Side::kCount && filter < layer.filters && entry < layer.filters)
        word =
            __ldg(coefficients + filter * length + entry / kEntriesPerWord) >> 2 * (entry % kEntriesPerWord);
    }
  }

  __device__ void put(const Call& call, Side& to) const {
    if (call.correlation) {
#pragma unroll
      for (int32_t i = 0; i < Side::kEach; ++i)
        put16(to.vector(thread / Side::kRowVectors + i * Side::kStep, thread % Side::kRowVectors), raw[i]);
    } else if (row() < Side::kCount) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const int32_t index = (i + thread / 2) % 4;  // so that eight threads write to all banks
        Vector<A, kVector<A>> signs;
#pragma unroll
        for (int32_t k = 0; k < kVector<A>; ++k) {
          const uint32_t code = word >> 2 * (index * kVector<A> + k) & 3;
          signs.x[k] = code == 3 ? A(-1) : code == 2 ? A(2) : code == 1 ? A(1) : A(0);
        }
        put16(to.vector(row(), 4 * strip() + index), signs);
      }
    }
  }
};

// Columns of filters on their way to shared memory, as a right operand.
template <class A, class Tile>
struct MovingFilters {
  Raw<A> raw[Tile::kEach];
  int64_t column;
  uint32_t thread;

  __device__ int32_t row_of(int32_t i) const { return thread / Tile::kRowVectors + i * Tile::kStep; }
  __device__ int32_t vector() const { return thread % Tile::kRowVectors * kVector<A>; }

  __device__ void load(const Layer& layer, const Call& call, int32_t depth) {
#pragma unroll
    for (int32_t i = 0; i < Tile::kEach; ++i) {
      const int32_t filter = depth + row_of(i);
      raw[i] = {};
      if (filter < layer.filters) raw[i] = load_raw<A>(layer, call.storage, filter, column + vector());
    }
  }

  // A lane's vector of coefficients belongs to neighbouring filters. These are put four rows apart, so that
  // the lanes' rows are neighbours.
  __device__ void put(const Layer& layer, const Call& call, int32_t depth, Tile& to) const {
    constexpr int32_t kStrip = Tile::Left::kStrip;
#pragma unroll
    for (int32_t i = 0; i < Tile::kEach; ++i) {
      const int32_t row = row_of(i), k = row % kStrip;
      Scale<A> scale{};
      if (depth + row < layer.filters)
        scale = static_cast<const Scale<A>*>(call.scales)[layer.first + depth + row];
      const auto values = centred<A>(raw[i], call.storage, scale, layer.size - column - vector());
      A* place = &to.right[row - k + k % kVector<A> * 4 + k / kVector<A>][vector()];
      put16(place, values);
    }
  }
};

// This lane's part of 32 columns from `first` on, of a strip of the depth, as a right operand: column g of
// the four groups is column kVector · g + f of as many neighbours as a vector holds.
template <class A, class Tile>
__device__ void read_filters(const Tile& tile, int32_t strip, int32_t first, int32_t lane, Operands<A>& to) {
#pragma unroll
  for (int32_t d = 0; d < kVector<A>; ++d)
#pragma unroll
    for (int32_t f = 0; f < 4; f += kVector<A>) {
      const A* place =
          &tile.right[strip * Tile::Left::kStrip + 4 * d + lane % 4][first + 8 * f + lane / 4 * kVector<A>];
      A part[kVector<A>];
      get16(place, part);
#pragma unroll
      for (int32_t k = 0; k < kVector<A>; ++k) to.right[d][f + k] = part[k];
    }
}

// A vector of a gradient, rounded; elements past the row's end are left out.
template <class T, class A>
__device__ void write_vector(const Layer& layer, int64_t row, int64_t column, const A (&x)[kVector<A>]) {
  T* to = static_cast<T*>(layer.out) + row * layer.size + column;
  Vector<T, kVector<A>> vector;
#pragma unroll
  for (int32_t i = 0; i < kVector<A>; ++i) vector.x[i] = narrow<T>(x[i]);
  if (layer.aligned) {
    if (column < layer.size) store(to, vector);
    return;
  }
#pragma unroll
  for (int32_t i = 0; i < kVector<A>; ++i)
    if (column + i < layer.size) to[i] = vector.x[i];
}

template <class A>
__device__ void write_gradient(const Layer& layer, const Call& call, int32_t row, int64_t column,
                               double factor, int32_t lane, const Results<A>& results) {
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t filter = row + 8 * i + lane / 4;
    if (filter >= layer.filters) continue;
    const A inverse = static_cast<const Scale<A>*>(call.scales)[layer.first + filter].inverse;
    const A scale = static_cast<A>(factor * static_cast<double>(inverse));
#pragma unroll
    for (int32_t f = 0; f < 4; f += kVector<A>)
#pragma unroll
      for (int32_t e = 0; e < 2; ++e) {
        A x[kVector<A>];
#pragma unroll
        for (int32_t k = 0; k < kVector<A>; ++k)
          x[k] = inverse != A(0) ? scale * results[i / 2][f + k][i % 2 * 2 + e] : A(0);
        const int64_t first = column + 8 * f + (lane % 4 * 2 + e) * kVector<A>;
        if (sizeof(A) == 8 || call.storage == Storage::wide)
          write_vector<A>(layer, filter, first, x);
        else if (call.storage == Storage::bfloat16)
          write_vector<__nv_bfloat16>(layer, filter, first, x);
        else
          write_vector<__half>(layer, filter, first, x);
      }
  }
}

template <class A, Precision P, bool Small>
__device__ void backward_tile(const Layer& layer, const Call& call, int32_t index,
                              BackwardShared<A>& shared) {
  using Tile = BackwardTile<A, Small>;
  const uint32_t thread = threadIdx.x;
  const int32_t warp = thread / 32, lane = thread % 32;
  const int32_t warp_row = Small ? 0 : warp / 2 * 32, warp_column = (Small ? warp : warp % 2) * 32;
  const int32_t row = index % layer.panels * Tile::kRows;
  const int64_t column = static_cast<int64_t>(index / layer.panels) * Tile::kColumns;
  Tile* tiles;
  if constexpr (Small)
    tiles = shared.small;
  else
    tiles = shared.large;
  const int32_t mine = row + thread;
  const bool used =
      __syncthreads_or(thread < Tile::kRows && mine < layer.filters &&
                       static_cast<const Scale<A>*>(call.scales)[layer.first + mine].inverse != A(0));
  Results<A> results = {};
  MovingCoefficients<A, typename Tile::Left> left;
  MovingFilters<A, Tile> right;
  left.first = row;
  left.thread = right.thread = thread;
  right.column = column;
  const auto load = [&](int32_t depth) {
    left.load(layer, call, depth);
    right.load(layer, call, depth);
  };
  const auto put = [&](int32_t depth, int32_t buffer) {
    left.put(call, tiles[buffer].left);
    right.put(layer, call, depth, tiles[buffer]);
    __syncthreads();
  };
  if (used) {
    load(0);
    put(0, 0);
    for (int32_t depth = 0, buffer = 0;; buffer ^= 1) {
      const int32_t next = depth + Tile::kDepth;
      if (next < layer.filters) load(next);
      Operands<A> operands;
#pragma unroll 1
      for (int32_t strip = 0; strip < Tile::kStrips; ++strip) {
        tiles[buffer].left.read_left(strip, warp_row, lane, operands);
        read_filters<A>(tiles[buffer], strip, warp_column, lane, operands);
        multiply<P>(operands, call.correlation, results);
      }
      if (next >= layer.filters) break;
      put(next, buffer ^ 1);
      depth = next;
    }
  }
  const double factor = gradient_factor<A>(layer, call, shared.sums);
  write_gradient<A>(layer, call, row + warp_row, column + warp_column, factor, lane, results);
}

}  // namespace fastprune::cuda::gram
