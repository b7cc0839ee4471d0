// csrc/cuda/decorrelation_gram.h for the tests: what the launcher computes, through ctypes.
#include <cstring>
#include <vector>

#include "../csrc/cuda/decorrelation_gram.h"

using namespace fastprune::cuda::gram;

using fastprune::DecorrelationLayer;

extern "C" {

int32_t gram_threads() { return kBlock; }
int32_t gram_capacity() { return kTable; }
int64_t gram_table_bytes() { return sizeof(Table); }

// Null with a message in `error` (of 256 bytes) where the layers cannot be laid out.
Plan* gram_plan(const DecorrelationLayer* layers, int64_t count, int64_t element_size, bool correlation,
                bool backward, int32_t capacity, char* error) {
  try {
    const std::vector<DecorrelationLayer> from(layers, layers + count);
    return new Plan(make_plan(from, element_size, correlation, backward, capacity));
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), 255);
    return nullptr;
  }
}

void gram_free(Plan* plan) { delete plan; }

// launches, bytes of counters, offsets of scales, parts, slots and penalties, bytes of scratch memory; tasks
// of every launch
void gram_sizes(const Plan* plan, int64_t accumulator_size, int64_t* sizes) {
  *sizes++ = static_cast<int64_t>(plan->launches.size());
  *sizes++ = 4 * plan->counters();
  *sizes++ = plan->scales_at();
  *sizes++ = plan->parts_at();
  *sizes++ = plan->slots_at(accumulator_size);
  *sizes++ = plan->penalties_at(accumulator_size);
  *sizes++ = plan->bytes(accumulator_size);
  for (const Launch& launch : plan->launches) *sizes++ = launch.measures + launch.tiles;
}

void gram_table(const Plan* plan, int64_t launch, void* to) {
  const Table table = make_table(*plan, plan->launches[launch]);
  std::memcpy(to, &table, sizeof(table));
}
}
