// A tile of a layer's Gram matrix: the products of its filters.
#pragma once

#include "gram_outcome.cuh"

namespace fastprune::cuda::gram {

// The tile of a layer: four warps that have a quarter of its results each, or, of a small one, a quarter of
// the depth.
template <class A, bool Small>
struct ForwardTile {
  static constexpr int32_t kRows = Small ? kSmallTile : kLargeTile;
  static constexpr int32_t kSides = Small ? 1 : 2;  // panels that lie in shared memory
  using Side = Panel<A, kRows, Small ? 4 : 2>;
};

template <class A>
struct ForwardShared {
  union {
    typename ForwardTile<A, false>::Side large[2][2];
    typename ForwardTile<A, true>::Side small[2][1];
    A parts[kBlock / 32 - 1][32][32];  // results of the warps beside the first: [element][lane]
    TileOutcome outcome;
  };
  Scale<A> scales[2][kLargeTile];  // of the tile's rows and columns
  double sums[kBlock / 32];
  __device__ ForwardShared() {}
};

// Vectors of a panel on their way from global to shared memory.
template <class A, class Side>
struct Moving {
  Raw<A> raw[Side::kEach];
  const Scale<A>* scales;  // of the panel's filters, in shared memory
  int32_t first;           // filter
  uint32_t thread;

  __device__ int32_t row_of(int32_t i) const { return thread / Side::kRowVectors + i * Side::kStep; }
  __device__ int32_t column() const { return thread % Side::kRowVectors; }
  __device__ void load(const Layer& layer, const Call& call, int64_t depth) {
#pragma unroll
    for (int32_t i = 0; i < Side::kEach; ++i) {
      raw[i] = {};
      if (scales[row_of(i)].inverse != A(0))
        raw[i] = load_raw<A>(layer, call.storage, first + row_of(i), depth + column() * kVector<A>);
    }
  }
  __device__ void put(const Layer& layer, const Call& call, int64_t depth, Side& to) const {
    const int64_t left = layer.size - depth - column() * kVector<A>;
#pragma unroll
    for (int32_t i = 0; i < Side::kEach; ++i)
      put16(to.vector(row_of(i), column()), centred<A>(raw[i], call.storage, scales[row_of(i)], left));
  }
};

// Whether any of a panel's filters takes part; their scales to shared memory.
template <class A>
__device__ bool read_scales(const Layer& layer, const Call& call, int32_t first, int32_t rows,
                            uint32_t thread, Scale<A>* to) {
  Scale<A> scale{};
  const int32_t row = thread;
  if (row < rows && first + row < layer.filters)
    scale = static_cast<const Scale<A>*>(call.scales)[layer.first + first + row];
  if (row < rows) to[row] = scale;
  return __syncthreads_or(scale.inverse != A(0));
}

// results = (left rows) · (right rows)ᵀ of this warp, over the whole depth.
template <class A, Precision P, bool Small>
__device__ void multiply_tile(const Layer& layer, const Call& call, const Place2d& tile, uint32_t thread,
                              ForwardShared<A>& shared, Results<A>& results) {
  using Side = typename ForwardTile<A, Small>::Side;
  const int32_t warp = thread / 32, lane = thread % 32;
  const bool both = !Small && tile.i != tile.j;  // panels; else the rows are the columns
  const auto sides = [&](int32_t buffer) -> Side* {
    if constexpr (Small)
      return shared.small[buffer];
    else
      return shared.large[buffer];
  };
  Moving<A, Side> left{{}, shared.scales[0], tile.i * tile.rows, thread};
  Moving<A, Side> right{{}, shared.scales[1], tile.j * tile.rows, thread};
  if (!read_scales(layer, call, left.first, tile.rows, thread, shared.scales[0])) return;
  if (both && !read_scales(layer, call, right.first, tile.rows, thread, shared.scales[1])) return;
  const auto load = [&](int64_t depth) {
    left.load(layer, call, depth);
    if (both) right.load(layer, call, depth);
  };
  const auto put = [&](int64_t depth, int32_t buffer) {
    left.put(layer, call, depth, sides(buffer)[0]);
    if (both) right.put(layer, call, depth, sides(buffer)[1]);
    __syncthreads();
  };
  load(0);
  put(0, 0);
  for (int64_t depth = 0, buffer = 0;; buffer ^= 1) {
    const int64_t next = depth + Side::kDepth;
    if (next < layer.size) load(next);
    const Side& rows = sides(buffer)[0];
    const Side& columns = sides(buffer)[both];
    Operands<A> operands;
    if constexpr (Small) {
      rows.read_left(warp, 0, lane, operands);
      rows.read_right(warp, 0, lane, operands);
      multiply<P>(operands, true, results);
    } else if (both || warp != 2) {  // on the diagonal, the lower quarter mirrors the upper one
#pragma unroll 1
      for (int32_t strip = 0; strip < 2; ++strip) {
        rows.read_left(strip, warp / 2 * 32, lane, operands);
        columns.read_right(strip, warp % 2 * 32, lane, operands);
        multiply<P>(operands, true, results);
      }
    }
    if (next >= layer.size) break;
    put(next, buffer ^ 1);
    depth = next;
  }
}

// The first warp's results become the sum of all warps', in their order.
template <class A>
__device__ void add_warps(uint32_t thread, ForwardShared<A>& shared, Results<A>& results) {
  const int32_t warp = thread / 32, lane = thread % 32;
  A* mine = &results[0][0][0];
  __syncthreads();
  if (warp > 0)
    for (int32_t i = 0; i < 32; ++i) shared.parts[warp - 1][i][lane] = mine[i];
  __syncthreads();
  if (warp == 0)
    for (int32_t part = 0; part < kBlock / 32 - 1; ++part)
      for (int32_t i = 0; i < 32; ++i) mine[i] += shared.parts[part][i][lane];
}

template <class A, Precision P, bool Small>
__device__ void forward_tile(const Layer& layer, const Call& call, int32_t index, ForwardShared<A>& shared) {
  const Place2d tile = tile_of(layer, index);
  const uint32_t thread = threadIdx.x;
  const int32_t warp = thread / 32, lane = thread % 32;
  Results<A> results = {};
  multiply_tile<A, P, Small>(layer, call, tile, thread, shared, results);
  if (Small) add_warps(thread, shared, results);
  __syncthreads();  // all have read what lies where the outcome goes
  const Quarter quarter{Small ? 0 : warp / 2 * 32, Small ? 0 : warp % 2 * 32, lane, tile.i == tile.j};
  const bool mine = !Small || warp == 0;
  if (call.correlation) {
    if (mine) write_correlations(layer, call, tile, quarter, results, shared.outcome);
    __syncthreads();
    write_squares(layer, call, tile, shared.outcome);
  } else {
    double total = mine ? pack_signs(quarter, call.diagonal, results, shared.outcome) : 0;
    total = sum_block(total, shared.sums);
    if (threadIdx.x == 0) call.slots[layer.slots + index] = total;
    write_signs(layer, call, tile, shared.outcome);
  }
}

}  // namespace fastprune::cuda::gram
