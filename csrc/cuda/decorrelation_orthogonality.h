// How the power iterations of all layers are laid out over the blocks of one grid. Host arithmetic without
// CUDA's types, as plan.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../decorrelation.h"
#include "plan.h"

namespace fastprune::cuda::orthogonality {

inline constexpr int32_t kRows = 8;    // of a layer, that a thread works on at once
inline constexpr int32_t kStages = 3;  // of a layer: its vectors, and two passes over its weights
// A stage's tasks are drawn so many tasks after those it waits for: more than blocks run at once, so that
// these are likely done, and few enough for the layer's weights to be still in the L2 cache.
inline constexpr int32_t kLag = 256;
inline constexpr int32_t kTable = 300;  // layers of a launch: 32 KB of parameters
inline constexpr int64_t kLargestFilter = INT32_MAX - kRows * kThreads;

struct Layer {
  const void* in;        // [F, K]
  void* out;             // the gradient; null forward
  int64_t scratch;       // index of the layer's vectors in the scratch; behind them a slot for each task
  int64_t coefficients;  // index of a and, behind it, b among the coefficients
  int32_t size;          // K
  int32_t stride;        // of vectors and slots: K and zeros, up to a whole vector
  int32_t filters;       // F
  int32_t first;         // index of its first filter among those of the model
  int32_t tasks;         // of a pass
  int32_t sizes[2];      // kh, kw
  int32_t strides[3];    // of C, kh, kw
  int16_t shift;         // 2^shift threads work on a row
  int16_t aligned;       // whether every row starts and ends on a vector, in and out
};

// Tasks first_task.. are those of a stage of a layer, up to the next entry's.
struct Stage {
  int32_t first_task;
  int16_t layer;
  int16_t stage;
};

struct Table {
  int32_t stages;
  int32_t tasks;
  int32_t first_layer;  // index of layers[0] among those of the model
  Layer layers[kTable];
  Stage order[kTable * kStages];
};

// Layers [first, first + count) in one grid.
struct Launch {
  int64_t first;
  int64_t count;
  int64_t tasks;
  std::vector<Stage> order;
};

struct Plan {
  std::vector<Layer> layers;
  std::vector<Launch> launches;  // one, up to kTable layers
  int64_t elements = 0;          // of scratch: vectors and slots, of the accumulator's type

  // Behind the elements: two doubles for each layer, then the counters: a launch's next task, one of finished
  // layers, then three for each layer.
  int64_t norms(int64_t element_size) const { return (elements * element_size + 15) / 16 * 16; }
  int64_t counters(int64_t element_size) const {
    return norms(element_size) + 16 * static_cast<int64_t>(layers.size());
  }
  int64_t counter_bytes() const {
    return 4 * static_cast<int64_t>(launches.size() + 1 + kStages * layers.size());
  }
};

// The order in which the tasks of a launch are drawn: of the layers begun the earliest whose last stage lies
// far enough back, else a new one, else the one whose last stage lies furthest back.
inline void order_stages(const std::vector<Layer>& layers, Launch& launch) {
  struct Progress {
    int64_t layer;
    int32_t stage;
    int64_t end;  // of its last stage
  };
  std::vector<Progress> begun;
  for (int64_t started = 0; started < launch.count || !begun.empty();) {
    auto next = std::find_if(begun.begin(), begun.end(),
                             [&](const Progress& p) { return launch.tasks - p.end >= kLag; });
    if (next == begun.end() && started < launch.count)
      next = begun.insert(begun.end(), {started++, 0, 0});
    else if (next == begun.end())
      next = std::min_element(begun.begin(), begun.end(),
                              [](const Progress& a, const Progress& b) { return a.end < b.end; });
    launch.order.push_back({static_cast<int32_t>(launch.tasks), static_cast<int16_t>(next->layer),
                            static_cast<int16_t>(next->stage)});
    launch.tasks += next->stage == 0 ? 1 : layers[launch.first + next->layer].tasks;
    next->end = launch.tasks;
    if (++next->stage == kStages) begun.erase(next);
  }
}

// Of a layer [F, K] in memory: how many threads share a row, and how many tasks of whole rows there are.
inline Layer lay_out(int64_t filters, int64_t size, int64_t width) {
  Layer layer{};
  layer.size = static_cast<int32_t>(size);
  layer.stride = static_cast<int32_t>((size + width - 1) / width * width);
  layer.filters = static_cast<int32_t>(filters);
  while (layer.shift < kThreadsShift && (width << layer.shift) < size) ++layer.shift;
  const int64_t rows = kRows * (kThreads >> layer.shift);
  layer.tasks = static_cast<int32_t>((filters + rows - 1) / rows);
  return layer;
}

// A thread reads `width` elements at once.
inline Plan make_plan(const std::vector<DecorrelationLayer>& layers, int64_t element_size, bool backward,
                      int32_t capacity = kTable) {
  const int64_t width = element_size == 8 ? 2 : 4, vectors = backward ? 4 : 2;
  Plan plan;
  for (const DecorrelationLayer& from : layers) {
    if (from.size > kLargestFilter || from.filters + from.first > kLargestFilter)
      throw std::runtime_error("fastprune: orthogonality takes at most " + std::to_string(kLargestFilter) +
                               " filters of " + std::to_string(kLargestFilter) + " elements on CUDA");
    Layer layer = lay_out(from.filters, from.size, width);
    const auto whole = [&](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (width * element_size) == 0 && from.size % width == 0;
    };
    layer.in = from.data;
    layer.out = from.gradient;
    layer.scratch = plan.elements;
    layer.coefficients = from.coefficients;
    layer.first = static_cast<int32_t>(from.first);
    for (int32_t d = 0; d < 3; ++d) layer.strides[d] = static_cast<int32_t>(from.strides[d]);
    for (int32_t d = 0; d < 2; ++d) layer.sizes[d] = static_cast<int32_t>(from.sizes[d + 1]);
    layer.aligned = whole(from.data) && whole(from.gradient);
    plan.elements += (vectors + layer.tasks) * layer.stride;
    if (plan.launches.empty() || plan.launches.back().count == capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, 0, {}});
    ++plan.launches.back().count;
    plan.layers.push_back(layer);
  }
  for (Launch& launch : plan.launches) order_stages(plan.layers, launch);
  return plan;
}

inline Table make_table(const Plan& plan, const Launch& launch) {
  Table table{};
  table.stages = static_cast<int32_t>(launch.order.size());
  table.tasks = static_cast<int32_t>(launch.tasks);
  table.first_layer = static_cast<int32_t>(launch.first);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  std::copy(launch.order.begin(), launch.order.end(), table.order);
  return table;
}

}  // namespace fastprune::cuda::orthogonality
