// How a model's layers are laid out over blocks and threads. Host arithmetic without CUDA's types, so that
// the tests run the very code that the launchers do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct CUstream_st;

namespace fastprune::cuda {

using Stream = CUstream_st*;  // cudaStream_t

enum class Dtype { float32, float64, bfloat16, float16 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

inline constexpr int32_t kThreads = 512;  // of every block
inline constexpr int32_t kThreadsShift = 9;
inline constexpr int32_t kWarpShift = 5;
inline constexpr int64_t kVectorBytes = 16;  // the widest access of one thread
// A filter with more vectors than this is worked on by a block, not by a warp or a part of one.
inline constexpr int64_t kWarpVectors = 2048;

// A parameter without filters is cut into rows of so many vectors, a block for each.
inline constexpr int64_t kRowVectors = 4096;

// Indices of filters and rows are 32 bits, in steps of a block's threads too.
inline constexpr int64_t kMostFilters = INT32_MAX - kThreads;

// What a kernel reads and writes of a layer, side by side in memory: as many tensors as it names.
inline constexpr int32_t kPointers = 4;

// What the caller knows of a layer: `filters` dense runs of `size` elements behind each pointer, or one run
// without filters where `filters` is 0. Pointers that mean nothing are null.
struct Run {
  const void* pointers[kPointers];
  int64_t filters;
  int64_t size;
};

struct TableLayer {
  const void* pointers[kPointers];
  int64_t size;         // of a filter, or of the whole run where it has none
  int32_t rows;         // filters, or pieces of the run
  int32_t first;        // index of its first filter among those of the model; -1: it has none
  int32_t first_block;  // and of its first block in the grid
  int16_t shift;        // 2^shift threads work on a row: up to a warp, or the block
  int16_t aligned;      // whether every row starts on a vector, and every filter ends on one
};

// The table of layers is a kernel parameter: no copy, no allocation, and a CUDA graph captures it by value.
// Parameters may be 32,764 bytes since CUDA 12.1, some of which are for the other ones; few models have so
// many layers that they need more.
inline constexpr int64_t kOtherParameters = 160;
inline constexpr int32_t kTable = (32764 - kOtherParameters) / sizeof(TableLayer);

struct Table {
  int32_t count;
  TableLayer layers[kTable];
};

// Layers [first, first + count) in one grid.
struct Launch {
  int64_t first;
  int64_t count;
  int64_t blocks;
};

struct Plan {
  std::vector<TableLayer> layers;
  std::vector<Launch> launches;  // one, up to kTable layers
  int64_t filters = 0;
  int64_t rows = 0;
  int64_t blocks = 0;  // of all launches
};

inline int16_t threads_shift(int64_t size, int64_t width) {
  const int64_t vectors = (size + width - 1) / width;
  if (vectors > kWarpVectors) return kThreadsShift;
  int16_t shift = 0;
  while (shift < kWarpShift && (int64_t{1} << shift) < vectors) ++shift;
  return shift;
}

// Whether all of a layer's vectors are aligned, behind every pointer: none is wider than kVectorBytes.
inline bool is_aligned(const Run& run, int64_t width) {
  for (const void* pointer : run.pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes) return false;
  return run.filters == 0 || run.size % width == 0;
}

inline TableLayer make_layer(const Run& run, int64_t width) {
  TableLayer layer{};
  std::copy_n(run.pointers, kPointers, layer.pointers);
  layer.size = run.size;
  layer.aligned = is_aligned(run, width);
  layer.shift = run.filters ? threads_shift(run.size, width) : kThreadsShift;
  return layer;
}

// A thread moves 16 bytes at once of the elements that have `element_bytes`: the widest kind of what is read
// and written, so that the accesses of a warp fill whole sectors everywhere, unless the kernel says
// otherwise. Runs of no elements are left out.
inline Plan make_plan(const std::vector<Run>& runs, int64_t element_bytes, int32_t capacity = kTable) {
  const int64_t width = kVectorBytes / element_bytes;
  Plan plan;
  plan.layers.reserve(runs.size());
  for (const Run& run : runs) {
    if (run.size == 0) continue;
    const int64_t row_size = kRowVectors * width;
    const int64_t rows = run.filters ? run.filters : (run.size + row_size - 1) / row_size;
    if (rows > kMostFilters - plan.rows)
      throw std::runtime_error("fastprune: a model may have at most " + std::to_string(kMostFilters) +
                               " filters on CUDA");
    if (plan.launches.empty() || plan.launches.back().count == capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, 0});
    Launch& launch = plan.launches.back();
    TableLayer layer = make_layer(run, width);
    layer.rows = static_cast<int32_t>(rows);
    layer.first = run.filters ? static_cast<int32_t>(plan.filters) : -1;
    layer.first_block = static_cast<int32_t>(launch.blocks);
    plan.layers.push_back(layer);
    const int64_t per_block = kThreads >> layer.shift;
    const int64_t blocks = (rows + per_block - 1) / per_block;
    ++launch.count;
    launch.blocks += blocks;
    plan.blocks += blocks;
    plan.rows += rows;
    plan.filters += run.filters;
  }
  return plan;
}

inline Table make_table(const Plan& plan, const Launch& launch) {
  Table table{};
  table.count = static_cast<int32_t>(launch.count);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  return table;
}

// An importance of weight_mask is a float32 that is not negative, which orders as its 31 bits do. They are
// counted in digits, most significant first. The first is the exponent and one bit more: Inf and NaN, and
// nothing else, are its last bins. The last one is so long because few importances begin with the other two.
struct Digit {
  int32_t shift, bits;
  int32_t first;  // of its 2^bits bins among those of all digits
};
inline constexpr Digit kWeightDigits[] = {{22, 9, 0}, {13, 9, 512}, {0, 13, 1024}};
inline constexpr int32_t kWeightPasses = 3;
inline constexpr int32_t kWeightBins = kWeightDigits[2].first + (1 << kWeightDigits[2].bits);
inline constexpr int32_t kInfinityBin = 0x7f800000 >> kWeightDigits[0].shift;

// What weight_mask's launches know of the threshold, on the device: zeros before the first.
struct WeightSelection {
  uint64_t counts[kWeightBins];
  uint64_t rank;   // of the threshold among the importances that begin with the digits found so far
  int32_t prefix;  // these digits, and at last the threshold; -1: an importance is not finite
  uint32_t tickets[kWeightPasses];
};

// The index in sorted scores of the threshold of filter_mask.
inline int64_t threshold_rank(int64_t filters, double rate) {
  return static_cast<int64_t>(static_cast<double>(filters) * rate);
}

}  // namespace fastprune::cuda
