// The layout of csrc/cuda/sgd_step_channels.h for the tests: what the launcher computes, through ctypes.
#include <cstring>

#include "../csrc/cuda/sgd_step_channels.h"

using namespace fastprune::cuda;

extern "C" {

int32_t channel_capacity() { return kChannelTable; }

// Writes the blocks of every launch, and its table, a kernel parameter, behind one another; returns the
// launches. Where `tables` is null, nothing is written but the size of a table, to `blocks`.
int64_t channel_launches(const ChannelRun* runs, int64_t count, int32_t capacity, int64_t* blocks,
                         char* tables) {
  const ChannelPlan plan = make_channel_plan({runs, runs + count}, capacity);
  if (!tables) *blocks = sizeof(ChannelTable);
  for (size_t i = 0; tables && i < plan.launches.size(); ++i) {
    const ChannelTable table = make_channel_table(plan, plan.launches[i]);
    std::memcpy(tables + i * sizeof(table), &table, sizeof(table));
    blocks[i] = plan.launches[i].blocks;
  }
  return static_cast<int64_t>(plan.launches.size());
}
}
