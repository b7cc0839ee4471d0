// The layouts of csrc/cuda/decorrelation_<kind>.h for the tests: what the launchers compute, through ctypes.
#include <cstring>
#include <exception>
#include <vector>

#include "../csrc/cuda/decorrelation_kernel_covariance.h"
#include "../csrc/cuda/decorrelation_orthogonality.h"

namespace kernel_covariance = fastprune::cuda::kernel_covariance;
namespace orthogonality = fastprune::cuda::orthogonality;

namespace {

using fastprune::DecorrelationLayer;

// Null with a message in `error` (of 256 bytes) where the layers cannot be laid out.
template <class F>
void* make(const F& make_plan, const DecorrelationLayer* layers, int64_t count, char* error) {
  try {
    return make_plan(std::vector<DecorrelationLayer>(layers, layers + count));
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), 255);
    return nullptr;
  }
}

template <class Table>
int64_t copy(const Table& table, void* to) {
  if (to) std::memcpy(to, &table, sizeof(table));
  return sizeof(table);
}

}  // namespace

extern "C" {

int32_t orthogonality_capacity() { return orthogonality::kTable; }

void* orthogonality_plan(const DecorrelationLayer* layers, int64_t count, int64_t element_size, bool backward,
                         int32_t capacity, char* error) {
  return make(
      [&](const std::vector<DecorrelationLayer>& from) {
        return new orthogonality::Plan(orthogonality::make_plan(from, element_size, backward, capacity));
      },
      layers, count, error);
}

void orthogonality_free(orthogonality::Plan* plan) { delete plan; }

// launches, offset of the norms and of the counters, bytes of counters, and the tasks of every launch
void orthogonality_sizes(const orthogonality::Plan* plan, int64_t accumulator_size, int64_t* sizes) {
  *sizes++ = static_cast<int64_t>(plan->launches.size());
  *sizes++ = plan->norms(accumulator_size);
  *sizes++ = plan->counters(accumulator_size);
  *sizes++ = plan->counter_bytes();
  for (const auto& launch : plan->launches) *sizes++ = launch.tasks;
}

// Writes a launch's table, a kernel parameter, and returns its size; nothing is written where `to` is null.
int64_t orthogonality_table(const orthogonality::Plan* plan, int64_t launch, void* to) {
  return copy(orthogonality::make_table(*plan, plan->launches[launch]), to);
}

int32_t kernel_covariance_capacity() { return kernel_covariance::kTable; }

void* kernel_covariance_plan(const DecorrelationLayer* layers, int64_t count, int64_t element_size, bool,
                             int32_t capacity, char* error) {
  return make(
      [&](const std::vector<DecorrelationLayer>& from) {
        return new kernel_covariance::Plan(kernel_covariance::make_plan(from, element_size, capacity));
      },
      layers, count, error);
}

void kernel_covariance_free(kernel_covariance::Plan* plan) { delete plan; }

// launches, blocks of all, offset of the ticket, and the blocks of every launch
void kernel_covariance_sizes(const kernel_covariance::Plan* plan, int64_t, int64_t* sizes) {
  *sizes++ = static_cast<int64_t>(plan->launches.size());
  *sizes++ = plan->blocks;
  *sizes++ = plan->ticket();
  for (const auto& launch : plan->launches) *sizes++ = launch.blocks;
}

int64_t kernel_covariance_table(const kernel_covariance::Plan* plan, int64_t launch, void* to) {
  return copy(kernel_covariance::make_table(*plan, plan->launches[launch]), to);
}
}
