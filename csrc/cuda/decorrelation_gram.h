// How the Gram matrices of all layers are laid out over the tasks of one grid, and the scratch memory that it
// wants. Host arithmetic without CUDA's types, as plan.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../decorrelation.h"

namespace fastprune::cuda::gram {

inline constexpr int32_t kBlock = 128;     // threads: four warps, each with 32 x 32 results
inline constexpr int32_t kLargeTile = 64;  // filters to a side of a tile
inline constexpr int32_t kSmallTile = 32;  // of a layer that has no more
inline constexpr int32_t kMeasured = 16;   // filters whose means are one task
// One size of the table only: two would double the time that the kernels take to compile.
inline constexpr int32_t kTable = 480;

struct Layer {
  const void* in;         // [F, K] in the order of memory
  void* out;              // the gradient; null forward
  int64_t size;           // K
  int64_t coefficients;   // index of the layer's first coefficient
  int64_t slots;          // and of the first of the sums that its tiles leave
  int32_t filters;        // F
  int32_t first;          // index of its first filter among those of the model
  int32_t first_measure;  // its first task that takes means
  int32_t first_tile;     // its first task that is a tile
  int32_t panels;         // tiles to a side
  int16_t small;          // whether it is one small tile
  int16_t aligned;        // whether every row starts and ends on 16 bytes (8 of a 16-bit dtype), in and out
};

// The tasks are those that take means, then the tiles; both layer by layer.
struct Table {
  int32_t count;
  int32_t first_layer;  // index of layers[0] among those of the model
  int32_t measures;     // tasks that take means
  int32_t tasks;
  Layer layers[kTable];
};

// Layers [first, first + count) in one grid.
struct Launch {
  int64_t first;
  int64_t count;
  int64_t measures;
  int64_t tiles;
};

struct Plan {
  std::vector<Layer> layers;
  std::vector<Launch> launches;  // one, up to kTable layers
  int64_t filters = 0;
  int64_t slots = 0;

  // Scratch memory: counters (the next task of every launch, the finished layers, and for every layer its
  // finished means and tiles); two sums for every filter; the mean and the scale of every filter; slots; a
  // penalty for every layer.
  int64_t counters() const { return static_cast<int64_t>(launches.size() + 1 + 2 * layers.size()); }
  int64_t parts_at() const { return (4 * counters() + 15) / 16 * 16; }
  int64_t scales_at() const { return parts_at() + 16 * filters; }
  int64_t slots_at(int64_t accumulator_size) const { return scales_at() + 2 * filters * accumulator_size; }
  int64_t penalties_at(int64_t accumulator_size) const { return slots_at(accumulator_size) + 8 * slots; }
  int64_t bytes(int64_t accumulator_size) const {
    return penalties_at(accumulator_size) + 8 * static_cast<int64_t>(layers.size());
  }
};

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Columns of a tile of the gradient.
inline constexpr int32_t gradient_columns(bool small) { return small ? 4 * kSmallTile : kLargeTile; }

// A covariance leaves a sum for every tile, a
// correlation one for every filter and panel.
inline Plan make_plan(const std::vector<DecorrelationLayer>& layers, int64_t element_size, bool correlation,
                      bool backward, int32_t capacity = kTable) {
  const int64_t vector = element_size == 8 ? 2 : 4;
  const auto whole = [&](const void* pointer, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % (vector * element_size) == 0 && size % vector == 0;
  };
  Plan plan;
  plan.layers.reserve(layers.size());
  for (const DecorrelationLayer& from : layers) {
    if (plan.launches.empty() || plan.launches.back().count == capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, 0, 0});
    Launch& launch = plan.launches.back();
    const bool small = from.filters <= kSmallTile;
    const int64_t panels = blocks_of(from.filters, small ? kSmallTile : kLargeTile);
    const int64_t tiles =
        backward ? panels * blocks_of(from.size, gradient_columns(small)) : panels * (panels + 1) / 2;
    plan.layers.push_back(
        {from.data, from.gradient, from.size, from.coefficients, plan.slots,
         static_cast<int32_t>(from.filters), static_cast<int32_t>(from.first),
         static_cast<int32_t>(launch.measures), static_cast<int32_t>(launch.tiles),
         static_cast<int32_t>(panels), static_cast<int16_t>(small),
         static_cast<int16_t>(whole(from.data, from.size) && whole(from.gradient, from.size))});
    ++launch.count;
    launch.measures += blocks_of(from.filters, kMeasured);
    launch.tiles += tiles;
    plan.filters += from.filters;
    if (!backward) plan.slots += correlation ? from.filters * panels : tiles;
    // Blocks that find no task left have drawn one, too.
    if (from.filters > INT32_MAX - plan.filters || launch.tiles > INT32_MAX / 2 - launch.measures)
      throw std::runtime_error("fastprune: the Gram matrices of a model may have at most " +
                               std::to_string(INT32_MAX / 2) + " tiles on CUDA");
  }
  return plan;
}

inline Table make_table(const Plan& plan, const Launch& launch) {
  Table table{};
  table.count = static_cast<int32_t>(launch.count);
  table.first_layer = static_cast<int32_t>(launch.first);
  table.measures = static_cast<int32_t>(launch.measures);
  table.tasks = static_cast<int32_t>(launch.measures + launch.tiles);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  return table;
}

}  // namespace fastprune::cuda::gram
