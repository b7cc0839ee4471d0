// How the rows of a layer that generates weights are laid out over blocks. Host arithmetic without CUDA's
// types, as plan.h.
//
// What is generated lies in lines: in one line, where it is in the order of the rows; in one for each filter
// and tap, if it is channels_last. A tile is a window of each of some neighbouring lines (the taps of a
// filter): all of the line if it is short, and then the tile is one run of the tensor. Other windows begin at
// whole sectors of the tensor, wherever their line does. The rows of a tile are one run of the layer's rows,
// or nearly so.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace fastprune::cuda::hyper {

inline constexpr int32_t kThreads = 256;  // of every block
inline constexpr int32_t kRows = 4;       // that a thread works on at once
inline constexpr int32_t kSector = 16;    // elements that are whole sectors, of any dtype
inline constexpr int32_t kMostTaps = 64;  // of a tile
inline constexpr int32_t kTile = 1024;    // elements of a tile
inline constexpr int32_t kSmallTile = 256;
inline constexpr int32_t kBanks = 32;                         // of shared memory
inline constexpr int32_t kPlaces = kMostTaps * (kBanks + 1);  // there, of a tile
inline constexpr int64_t kManyRows = 1 << 17;                 // from so many on, a tile is not a small one
// A panel is the part of every row that a warp reads at once.
inline constexpr int32_t kPanelVectors = 32;
// Blocks of the backward, each of which leaves a sum for the last one to add up.
inline constexpr int32_t kMostBlocks = 512;
inline constexpr int64_t kMostRows = INT32_MAX - kMostBlocks * kTile;

// Divides by a multiplication, numbers below 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

inline Divisor divisor_of(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t above = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((above << 32) / divisor + 1), shift};
}

// The backward's: the panels in x, since a grid has at most 65,535 blocks in y.
struct Grid {
  int32_t x, y;
};

struct Geometry {
  int32_t size;         // H
  int32_t vectors;      // of a row
  int32_t shift;        // 2^shift threads work on a row of a panel: kRows at least, up to a warp
  int32_t aligned;      // whether every row starts on a vector and ends on one
  int32_t filter_rows;  // I·kh·kw
  int32_t taps;         // lines of a filter
  int32_t length;       // of a line
  int32_t slack;        // a window begins up to so many elements before where it should: 2^n - 1
  int32_t window;       // of a line
  int32_t pitch;        // of windows in shared memory
  int32_t windows;      // of a line
  int32_t tile_taps;    // lines of a tile
  int32_t tap_groups;   // tiles beside one another, of a filter
  int32_t tiles;
  Divisor by_tile_taps, by_window;
  Divisor by_run;  // rows, that are wanted, of a filter in a line
  // The backward's rows that get zeros: `gap` behind the run of every wanted filter, then all.
  int32_t run, gap, gaps, free_rows;  // gaps: rows in all of them; free_rows: those and the rest
  int32_t first_free;                 // row of the first filter that is not wanted
  int32_t zero_rows, zero_tiles;      // rows of such a tile, and how many tiles
  Divisor by_gap;

  int32_t panels() const { return (vectors + kPanelVectors - 1) / kPanelVectors; }
  int32_t columns(int32_t width) const { return panels() * kPanelVectors * width; }  // of a slot
  int32_t blocks() const { return std::min(tiles + zero_tiles, kMostBlocks); }       // of the backward
  Grid grid() const { return {panels(), blocks()}; }
  int32_t slots() const { return std::min(tiles, kMostBlocks); }
};

inline int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// At least `size`, and such that neighbouring rows, the taps of some channels, are in different banks.
inline int32_t pitch_of(int32_t size, int32_t taps) {
  const int32_t channels = (kBanks / taps | 1) % kBanks;
  return size + (channels - size % kBanks + kBanks) % kBanks;
}

// `Slice` is HyperSlice of csrc/hyper_weight.h. `aligned` tells of the addresses only.
template <class Slice>
Geometry make_geometry(const Slice& slice, int64_t element_size, bool aligned) {
  const int64_t wanted = slice.out_channels * slice.in_channels * slice.taps;
  const int64_t rows = slice.filters * slice.filter_rows, width = kVectorBytes / element_size;
  if (rows > kMostRows || slice.size > kMostRows)
    throw std::runtime_error("fastprune: a layer may generate at most " + std::to_string(kMostRows) +
                             " weights on CUDA");
  Geometry g{};
  g.size = static_cast<int32_t>(slice.size);
  g.vectors = ceil_div(slice.size, width);
  g.shift = 2;
  while (g.shift < kWarpShift && (1 << g.shift) < g.vectors) ++g.shift;
  g.aligned = aligned && slice.size % width == 0;
  g.filter_rows = static_cast<int32_t>(slice.filter_rows);
  g.run = static_cast<int32_t>(slice.in_channels * slice.taps);

  g.taps = slice.by_tap ? static_cast<int32_t>(slice.taps) : 1;
  g.length = static_cast<int32_t>(slice.by_tap ? slice.in_channels : wanted);
  const int32_t tile = !slice.by_tap && wanted < kManyRows ? kSmallTile : kTile;
  g.tile_taps = std::min(g.taps, kMostTaps);
  const bool whole = slice.by_tap && int64_t{g.tile_taps} * g.length <= kTile;
  g.slack = slice.by_tap && !whole && g.length % kSector ? kSector - 1 : 0;
  g.window = whole ? g.length : tile / g.tile_taps / kSector * kSector;
  // The elements of a warp are neighbours across short lines, too, but not across whole multiples of a warp.
  g.pitch = whole && g.window % kBanks ? g.window | 1 : pitch_of(g.window + g.slack, g.tile_taps);
  g.windows = ceil_div(g.length + g.slack, g.window);
  g.tap_groups = ceil_div(g.taps, g.tile_taps);
  g.tiles = static_cast<int32_t>((slice.by_tap ? slice.out_channels : 1) * g.tap_groups * g.windows);
  g.by_tile_taps = divisor_of(g.tile_taps);
  g.by_window = divisor_of(g.window);
  g.by_run = divisor_of(slice.by_tap ? g.length : g.run);

  g.gap = g.filter_rows - g.run;
  g.gaps = static_cast<int32_t>(slice.out_channels * g.gap);
  g.first_free = static_cast<int32_t>(slice.out_channels * slice.filter_rows);
  g.free_rows = static_cast<int32_t>(rows - wanted);
  g.zero_rows = tile;
  g.zero_tiles = ceil_div(g.free_rows, tile);
  g.by_gap = divisor_of(std::max(g.gap, 1));
  return g;
}

// Pointers to what both directions read; `bias` is the forward's only.
struct Operands {
  const void *hidden, *weight, *bias;
};

// What the backward writes: all gradients, and on the way a sum of every block and panel.
struct Results {
  void *hidden, *weight, *bias;
  double* slots;
  uint32_t* tickets;
};

// The launches of hyper_weight.cu. `dtype` is that of hidden, weight and bias.
void launch_forward(const Geometry& g, Dtype dtype, Dtype out, const Operands& from, void* generated,
                    Stream stream);
void launch_backward(const Geometry& g, Dtype dtype, Dtype in, const void* grad, const Operands& from,
                     const Results& to, Stream stream);

}  // namespace fastprune::cuda::hyper
