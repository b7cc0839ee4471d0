// csrc/cuda/plan.h for the tests: what the launchers compute, through ctypes.
#include <cstring>

#include "../csrc/cuda/plan.h"

using namespace fastprune::cuda;

extern "C" {

int32_t threads() { return kThreads; }
int32_t capacity() { return kTable; }
int32_t weight_passes() { return kWeightPasses; }
int32_t weight_digit_shift(int32_t pass) { return kWeightDigits[pass].shift; }
int32_t weight_digit_bits(int32_t pass) { return kWeightDigits[pass].bits; }
int32_t weight_digit_first(int32_t pass) { return kWeightDigits[pass].first; }
int64_t weight_selection_bytes() { return sizeof(WeightSelection); }
int64_t rank_of(int64_t filters, double rate) { return threshold_rank(filters, rate); }

// Plans `count` runs; null with a message in `error` (of 256 bytes) where that is impossible.
Plan* plan(const Run* runs, int64_t count, int64_t element_bytes, int32_t capacity, char* error) {
  try {
    return new Plan(make_plan({runs, runs + count}, element_bytes, capacity));
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), 255);
    return nullptr;
  }
}

void free_plan(Plan* plan) { delete plan; }
int64_t filters(const Plan* plan) { return plan->filters; }
int64_t blocks(const Plan* plan) { return plan->blocks; }
int64_t launches(const Plan* plan) { return static_cast<int64_t>(plan->launches.size()); }
int64_t launch_blocks(const Plan* plan, int64_t i) { return plan->launches[i].blocks; }

// Writes the table of a launch, a kernel parameter, and returns its size; 0 bytes are written where `to` is
// null.
int64_t table(const Plan* plan, int64_t i, void* to) {
  const Table table = make_table(*plan, plan->launches[i]);
  if (to) std::memcpy(to, &table, sizeof(table));
  return sizeof(table);
}
}
