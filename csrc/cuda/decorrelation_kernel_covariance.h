// How the kernel slices of all layers are laid out over the blocks of one grid. Host arithmetic without
// CUDA's types, as plan.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../decorrelation.h"
#include "plan.h"

namespace fastprune::cuda::kernel_covariance {

inline constexpr int64_t kTileBytes = 36864;          // of shared memory, for the slices of a block
inline constexpr int64_t kZeroBytes = 16 * 4096;      // written by a block where there is no covariance
inline constexpr int64_t kLargestFilter = INT32_MAX;  // strides within a filter are 32 bits
inline constexpr int32_t kTable = 440;                // layers of a launch: 32 KB of parameters

// How a block gets at its slices.
enum class Way : int16_t {
  zeros,    // not at all: rows of one column have no covariance
  dense,    // all slices of the layer are one run: by vectors, whichever thread works on the slice
  strided,  // every thread its own slices, element by element; neighbours in channels_last are neighbours
  huge,     // one slice that is too large for shared memory, by the whole block
};

struct Layer {
  const void* in;  // [F, C, kh, kw]
  void* out;       // the gradient; null forward
  int32_t filters;
  int32_t channels;
  int32_t kh;
  int32_t kw;
  int32_t strides[3];   // of C, kh, kw
  int32_t first;        // index of its first filter among those of the model
  int32_t first_block;  // of its first block in the grid
  int32_t per_block;    // slices; with Way::zeros, elements
  Way way;
  int16_t aligned;  // whether the layer begins on a vector, in and out
};

struct Table {
  int32_t count;
  Layer layers[kTable];
};

// Layers [first, first + count) in one grid.
struct Launch {
  int64_t first;
  int64_t count;
  int64_t first_block;  // among those of all launches
  int64_t blocks;
};

struct Plan {
  std::vector<Layer> layers;
  std::vector<Launch> launches;  // one, up to kTable layers; none where there is nothing to do
  int64_t blocks = 0;            // of all launches

  // Scratch: a double for each block, then the ticket.
  int64_t ticket() const { return 8 * blocks; }
};

// Square kernels of these sizes are worked on in registers, others in shared memory, beside their gradient.
inline constexpr bool in_registers(int64_t kh, int64_t kw) { return kh == kw && (kh == 3 || kh == 5); }

inline Way way_of(const Layer& layer, int64_t elements, int64_t tile) {
  if (layer.kw == 1) return Way::zeros;
  if (4 * elements > tile) return Way::huge;
  const bool dense = (layer.channels == 1 || layer.strides[0] == elements) &&
                     (layer.kh == 1 || layer.strides[1] == layer.kw) && layer.strides[2] == 1;
  return dense ? Way::dense : Way::strided;
}

// The layer, and how many blocks it wants.
inline std::pair<Layer, int64_t> lay_out(const DecorrelationLayer& from, int64_t element_size) {
  if (from.size > kLargestFilter || from.filters + from.first > kMostFilters)
    throw std::runtime_error("fastprune: kernel-covariance takes at most " + std::to_string(kMostFilters) +
                             " filters of " + std::to_string(kLargestFilter) + " elements on CUDA");
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  Layer layer{from.data,
              from.gradient,
              narrow(from.filters),
              narrow(from.sizes[0]),
              narrow(from.sizes[1]),
              narrow(from.sizes[2]),
              {narrow(from.strides[0]), narrow(from.strides[1]), narrow(from.strides[2])},
              narrow(from.first),
              0,
              1,
              Way::zeros,
              0};
  const auto whole = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  layer.aligned = whole(from.data) && whole(from.gradient);
  const int64_t elements = from.sizes[1] * from.sizes[2], slices = from.filters * from.sizes[0];
  const int64_t room = kTileBytes / (element_size == 8 ? 8 : 4) / (in_registers(layer.kh, layer.kw) ? 1 : 2);
  layer.way = way_of(layer, elements, room);
  int64_t count = slices;
  if (layer.way == Way::zeros) {
    count = from.gradient ? from.filters * from.size : 0;
    layer.per_block = narrow(kZeroBytes / element_size);
  } else if (layer.way != Way::huge) {
    layer.per_block = narrow(room / elements / 4 * 4);  // so that every block begins on a vector
  }
  return {layer, (count + layer.per_block - 1) / layer.per_block};
}

// Layers have gradients or, forward, none.
inline Plan make_plan(const std::vector<DecorrelationLayer>& layers, int64_t element_size,
                      int32_t capacity = kTable) {
  Plan plan;
  for (const DecorrelationLayer& from : layers) {
    auto [layer, blocks] = lay_out(from, element_size);
    if (blocks == 0) continue;
    if (plan.launches.empty() || plan.launches.back().count == capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, plan.blocks, 0});
    Launch& launch = plan.launches.back();
    layer.first_block = static_cast<int32_t>(launch.blocks);
    ++launch.count;
    launch.blocks += blocks;
    plan.blocks += blocks;
    if (plan.blocks > INT32_MAX)
      throw std::runtime_error("fastprune: too many weights for kernel-covariance");
    plan.layers.push_back(layer);
  }
  return plan;
}

inline Table make_table(const Plan& plan, const Launch& launch) {
  Table table{};
  table.count = static_cast<int32_t>(launch.count);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  return table;
}

}  // namespace fastprune::cuda::kernel_covariance
