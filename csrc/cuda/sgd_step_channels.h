// The launch of sgd_step_channels.cu, and how it lays out the input channels of a model's weights: host
// arithmetic without CUDA's types, so that the tests run it.
#pragma once

#include "plan.h"

namespace fastprune::cuda {

// A weight is [rows, channels, inner] in memory, as csrc/check.h says: rows of channels · inner columns. A
// block has a group of whole channels, up to this many columns of every row.
inline constexpr int32_t kMostSlotsShift = 6;

// What the caller knows of a weight; as ChannelView of csrc/check.h, which needs PyTorch's headers.
struct ChannelRun {
  const void* weight;
  int64_t rows, channels, inner;
};

struct ChannelLayer {
  const void* weight;
  int64_t rows, inner;
  int32_t channels;
  int32_t group;        // channels of a block
  int32_t first;        // index of its first channel among those of the model
  int32_t first_block;  // and of its first block in the grid
  int32_t shift;        // 2^shift columns are added up side by side
};

inline constexpr int32_t kChannelTable = (32764 - kOtherParameters) / sizeof(ChannelLayer);

struct ChannelTable {
  int32_t count;
  ChannelLayer layers[kChannelTable];
};

struct ChannelPlan {
  std::vector<ChannelLayer> layers;
  std::vector<Launch> launches;
};

inline ChannelPlan make_channel_plan(const std::vector<ChannelRun>& runs, int32_t capacity = kChannelTable) {
  ChannelPlan plan;
  int64_t first = 0;
  for (const ChannelRun& run : runs) {
    if (run.channels > INT32_MAX - first)
      throw std::runtime_error("fastprune: a model may have at most " + std::to_string(INT32_MAX) +
                               " input channels on CUDA");
    if (plan.launches.empty() || plan.launches.back().count == capacity)
      plan.launches.push_back({static_cast<int64_t>(plan.layers.size()), 0, 0});
    Launch& launch = plan.launches.back();
    int32_t shift = 0;
    while (shift < kMostSlotsShift && (int64_t{1} << shift) < run.channels * run.inner) ++shift;
    const int64_t group = std::max<int64_t>((int64_t{1} << shift) / run.inner, 1);
    plan.layers.push_back({run.weight, run.rows, run.inner, static_cast<int32_t>(run.channels),
                           static_cast<int32_t>(group), static_cast<int32_t>(first),
                           static_cast<int32_t>(launch.blocks), shift});
    ++launch.count;
    launch.blocks += (run.channels + group - 1) / group;
    first += run.channels;
  }
  return plan;
}

inline ChannelTable make_channel_table(const ChannelPlan& plan, const Launch& launch) {
  ChannelTable table{};
  table.count = static_cast<int32_t>(launch.count);
  std::copy_n(plan.layers.begin() + launch.first, launch.count, table.layers);
  return table;
}

// norms: one for each input channel of all weights.
void launch_channel_norms(const ChannelPlan& plan, Dtype dtype, float* norms, int32_t ord, Stream stream);

}  // namespace fastprune::cuda
