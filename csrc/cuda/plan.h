// How a model's layers are laid out over blocks and threads. Host arithmetic without CUDA's types, so that
// the tests run the very code that the launchers do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastprune::cuda {

inline constexpr int32_t kThreads = 512;  // of every block
inline constexpr int32_t kThreadsShift = 9;
inline constexpr int32_t kWarpShift = 5;
inline constexpr int64_t kVectorBytes = 16;  // the widest access of one thread
// A filter with more vectors than this is worked on by a block, not by a warp or a part of one.
inline constexpr int64_t kWarpVectors = 2048;

// Indices of filters are 32 bits, in steps of a block's threads too.
inline constexpr int64_t kMostFilters = INT32_MAX - kThreads;

// The table of layers is a kernel parameter: no copy, no allocation, and a CUDA graph captures it by value.
// Parameters may be 4 KB, and 32 KB since CUDA 12.1; few models have so many layers that they need more.
inline constexpr int32_t kSmallTable = 96;
inline constexpr int32_t kLargeTable = 800;

// What the caller knows of a layer: `filters` dense runs of `size` elements; `out` is null where nothing is
// written.
struct Run {
  const void* in;
  void* out;
  int64_t filters;
  int64_t size;
};

struct TableLayer {
  const void* in;
  void* out;
  int64_t size;
  int32_t filters;
  int32_t first;        // index of its first filter among those of the model
  int32_t first_block;  // and of its first block in the grid
  int16_t shift;        // 2^shift threads work on a filter: up to a warp, or the block
  int16_t aligned;      // whether every filter starts and ends on a vector, in and out
};

template <int32_t Capacity>
struct Table {
  int32_t count;
  TableLayer layers[Capacity];
};

// Layers [first, first + count) in one grid.
struct Launch {
  int64_t first;
  int64_t count;
  int64_t blocks;
};

struct Plan {
  std::vector<TableLayer> layers;
  std::vector<Launch> launches;  // one, up to kLargeTable layers
  int64_t filters = 0;
  int64_t blocks = 0;  // of all launches
  int32_t capacity = kSmallTable;
};

inline int16_t threads_shift(int64_t size, int64_t width) {
  const int64_t vectors = (size + width - 1) / width;
  if (vectors > kWarpVectors) return kThreadsShift;
  int16_t shift = 0;
  while (shift < kWarpShift && (int64_t{1} << shift) < vectors) ++shift;
  return shift;
}

// Elements of `in_bytes` in and `out_bytes` out (0: nothing is written); a thread moves `width` of them at
// once, 16 bytes of the wider kind, so that the accesses of a warp fill whole sectors on both sides.
inline Plan make_plan(const std::vector<Run>& runs, int64_t in_bytes, int64_t out_bytes,
                      int32_t small_table = kSmallTable, int32_t large_table = kLargeTable) {
  const int64_t width = kVectorBytes / std::max(in_bytes, out_bytes);
  const auto whole = [](const void* pointer, int64_t size, int64_t bytes, int64_t elements) {
    return reinterpret_cast<uintptr_t>(pointer) % (elements * bytes) == 0 && size % elements == 0;
  };
  Plan plan;
  plan.capacity = static_cast<int64_t>(runs.size()) <= small_table ? small_table : large_table;
  plan.layers.reserve(runs.size());
  for (const Run& run : runs) {
    if (run.filters > kMostFilters - plan.filters)
      throw std::runtime_error("fastprune: a model may have at most " + std::to_string(kMostFilters) +
                               " filters on CUDA");
    if (plan.launches.empty() || plan.launches.back().count == plan.capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, 0});
    Launch& launch = plan.launches.back();
    const int16_t shift = threads_shift(run.size, width);
    const int64_t per_block = kThreads >> shift;
    const bool aligned = whole(run.in, run.size, in_bytes, width) &&
                         (!out_bytes || whole(run.out, run.size, out_bytes, width));
    plan.layers.push_back({run.in, run.out, run.size, static_cast<int32_t>(run.filters),
                           static_cast<int32_t>(plan.filters), static_cast<int32_t>(launch.blocks), shift,
                           static_cast<int16_t>(aligned)});
    const int64_t blocks = (run.filters + per_block - 1) / per_block;
    ++launch.count;
    launch.blocks += blocks;
    plan.blocks += blocks;
    plan.filters += run.filters;
  }
  return plan;
}

template <int32_t Capacity>
Table<Capacity> make_table(const Plan& plan, const Launch& launch) {
  Table<Capacity> table{};
  table.count = static_cast<int32_t>(launch.count);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  return table;
}

// The index in sorted scores of the threshold of filter_mask.
inline int64_t threshold_rank(int64_t filters, double rate) {
  return static_cast<int64_t>(static_cast<double>(filters) * rate);
}

}  // namespace fastprune::cuda
