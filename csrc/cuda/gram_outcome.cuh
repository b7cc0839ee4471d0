// What becomes of a tile of a Gram matrix: signs in two bits, or correlations, and its part of the penalty.
#pragma once

#include "gram.cuh"

namespace fastprune::cuda::gram {

// What is left of a tile once it is multiplied.
struct TileOutcome {
  uint32_t words[2][kLargeTile][kLargeTile / kEntriesPerWord];  // signs of its rows, and of its columns
  double squares[2][kLargeTile][2];                             // sums of rows, and of columns, by two warps
};

// Where a tile lies: panels (i, j) of `rows` filters each.
struct Place2d {
  int32_t index, i, j, rows;
};

__device__ inline Place2d tile_of(const Layer& layer, int32_t index) {
  Place2d tile{index, 0, index, layer.small ? kSmallTile : kLargeTile};
  for (int32_t length = layer.panels; tile.j >= length; --length, ++tile.i) tile.j -= length;
  tile.j += tile.i;
  return tile;
}

// The place of a warp's quarter of a tile, and of this lane in it.
struct Quarter {
  int32_t row, column;  // in the tile
  int32_t lane;
  bool diagonal;  // of the layer's matrix
  __device__ int32_t row_of(int32_t m, int32_t e) const { return row + 16 * m + e / 2 * 8 + lane / 4; }
  __device__ int32_t column_of(int32_t f, int32_t e) const { return column + 8 * f + lane % 4 * 2 + e % 2; }
  // Whether this result counts, and is not the mirror of another one.
  __device__ bool counts(int32_t m, int32_t f, int32_t e, bool own) const {
    const int32_t r = row_of(m, e), c = column_of(f, e);
    return !diagonal || c > r || (own && c == r);
  }
};

__device__ inline uint32_t or_lanes(uint32_t bits, int32_t low, int32_t high) {
  for (int32_t offset = low; offset < high; offset *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, offset);
  return bits;
}

// Two bits for each of a warp's results, in words along rows and along columns; returns this thread's share
// of Σ |C_ij|.
template <class A>
__device__ double pack_signs(const Quarter& quarter, bool own, const Results<A>& results, TileOutcome& to) {
  constexpr int32_t kWord = static_cast<int32_t>(kEntriesPerWord);
  const int32_t lane = quarter.lane;
  double total = 0;
  uint32_t rows[2][2][2] = {}, columns[4][2][2] = {};  // [m][h][word], [f][column][word]
#pragma unroll
  for (int32_t m = 0; m < 2; ++m)
#pragma unroll
    for (int32_t f = 0; f < 4; ++f)
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) {
        if (!quarter.counts(m, f, e, own)) continue;
        const A value = results[m][f][e];
        const bool twice = quarter.diagonal && quarter.row_of(m, e) == quarter.column_of(f, e);
        const uint32_t code = value > A(0) ? (twice ? 2u : 1u) : value < A(0) ? 3u : 0u;
        total += static_cast<double>(fabs(value));
        rows[m][e / 2][f / 2] |= code << 2 * (f % 2 * 8 + lane % 4 * 2 + e % 2);
        columns[f][e % 2][m] |= code << 2 * (e / 2 * 8 + lane / 4);
      }
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    const uint32_t word = or_lanes(rows[i / 4][i / 2 % 2][i % 2], 1, 4);
    if (lane % 4 == 0)
      to.words[0][quarter.row_of(i / 4, i / 2 % 2 * 2)][quarter.column / kWord + i % 2] = word;
  }
#pragma unroll
  for (int32_t i = 0; i < 16; ++i) {
    const uint32_t word = or_lanes(columns[i / 4][i / 2 % 2][i % 2], 4, 32);
    if (lane / 4 == 0) to.words[1][quarter.column_of(i / 4, i / 2 % 2)][quarter.row / kWord + i % 2] = word;
  }
  return total;
}

// The words of a tile to where they belong; on the diagonal, rows and columns are the same filters.
__device__ inline void write_signs(const Layer& layer, const Call& call, const Place2d& tile,
                                   const TileOutcome& from) {
  const int32_t each = tile.rows / static_cast<int32_t>(kEntriesPerWord);
  const int64_t length = words_of(layer);
  uint32_t* coefficients = static_cast<uint32_t*>(call.coefficients) + layer.coefficients;
  const auto write = [&](int32_t row, int32_t panel, int32_t word, uint32_t bits) {
    if (row < layer.filters && panel * each + word < length)
      coefficients[row * length + panel * each + word] = bits;
  };
  for (int32_t k = threadIdx.x; k < tile.rows * each; k += kBlock) {
    const int32_t row = k / each, word = k % each;
    const uint32_t along = from.words[0][row][word], across = from.words[1][row][word];
    if (tile.i == tile.j) {
      write(tile.i * tile.rows + row, tile.i, word, along | across);
    } else {
      write(tile.i * tile.rows + row, tile.j, word, along);
      write(tile.j * tile.rows + row, tile.i, word, across);
    }
  }
}

// A warp's correlations on both sides of the diagonal, and their squares by rows and by columns.
template <class A>
__device__ void write_correlations(const Layer& layer, const Call& call, const Place2d& tile,
                                   const Quarter& quarter, const Results<A>& results, TileOutcome& to) {
  const int32_t lane = quarter.lane;
  A* coefficients = static_cast<A*>(call.coefficients) + layer.coefficients;
  double rows[2][2] = {}, columns[4][2] = {};
#pragma unroll
  for (int32_t m = 0; m < 2; ++m)
#pragma unroll
    for (int32_t f = 0; f < 4; ++f)
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) {
        const int64_t row = tile.i * tile.rows + quarter.row_of(m, e);
        const int64_t column = tile.j * tile.rows + quarter.column_of(f, e);
        if (!quarter.counts(m, f, e, false) || row >= layer.filters || column >= layer.filters) continue;
        const A value = results[m][f][e];
        coefficients[row * layer.filters + column] = value;
        coefficients[column * layer.filters + row] = value;
        const double square = static_cast<double>(value) * static_cast<double>(value);
        rows[m][e / 2] += square;
        columns[f][e % 2] += square;
      }
  const auto sum = [](double x, int32_t low, int32_t high) {
    for (int32_t offset = low; offset < high; offset *= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
    return x;
  };
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const double square = sum(rows[i / 2][i % 2], 1, 4);
    if (lane % 4 == 0) to.squares[0][quarter.row_of(i / 2, i % 2 * 2)][quarter.column / 32] = square;
  }
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    const double square = sum(columns[i / 2][i % 2], 4, 32);
    if (lane / 4 == 0) to.squares[1][quarter.column_of(i / 2, i % 2)][quarter.row / 32] = square;
  }
}

// The sums of squares of a tile's rows and columns to the slots of their filters, one for every panel.
__device__ inline void write_squares(const Layer& layer, const Call& call, const Place2d& tile,
                                     const TileOutcome& from) {
  double* slots = call.slots + layer.slots;
  const auto sum = [&](int32_t side, int32_t row) {
    return from.squares[side][row][0] + (layer.small ? 0 : from.squares[side][row][1]);
  };
  const auto write = [&](int32_t row, int32_t panel, double squares) {
    if (row < layer.filters) slots[static_cast<int64_t>(row) * layer.panels + panel] = squares;
  };
  for (int32_t row = threadIdx.x; row < tile.rows; row += kBlock) {
    if (tile.i == tile.j) {
      write(tile.i * tile.rows + row, tile.i, sum(0, row) + sum(1, row));
    } else {
      write(tile.i * tile.rows + row, tile.j, sum(0, row));
      write(tile.j * tile.rows + row, tile.i, sum(1, row));
    }
  }
}

// By the block that finished a layer's last tile: its penalty, from the slots in their order.
template <class A>
__device__ double layer_penalty(const Layer& layer, const Call& call, int32_t tiles, double* shared) {
  const double* slots = call.slots + layer.slots;
  double total = 0, kept = 0;
  if (!call.correlation) {
    for (int32_t tile = threadIdx.x; tile < tiles; tile += kBlock) total += slots[tile];
    return sum_block(total, shared) / static_cast<double>(layer.size > 1 ? layer.size - 1 : 1);
  }
  A* coefficients = static_cast<A*>(call.coefficients) + layer.coefficients;
  for (int32_t row = threadIdx.x; row < layer.filters; row += kBlock) {
    double squares = 0;
    for (int32_t panel = 0; panel < layer.panels; ++panel)
      squares += slots[static_cast<int64_t>(row) * layer.panels + panel];
    coefficients[static_cast<int64_t>(row) * (layer.filters + 1)] = static_cast<A>(-squares);
    total += squares;
    kept += call.mask == nullptr || call.mask[layer.first + row];
  }
  total = sum_block(total, shared);
  return sqrt(total) / fmax(sum_block(kept, shared), 1.0);
}

// The penalty of the model, from its layers' in their order.
template <class A>
__device__ void write_penalty(const Call& call, double* shared) {
  double total = 0;
  for (int32_t layer = threadIdx.x; layer < call.layers; layer += kBlock) total += call.penalties[layer];
  total = sum_block(total, shared);
  if (threadIdx.x == 0) *static_cast<A*>(call.scalar) = static_cast<A>(total);
}

}  // namespace fastprune::cuda::gram
