// The penalties on Gram matrices, covariance and correlation: contracts in fastprune/ops/decorrelation.py.
#include "decorrelation.h"
#include "gram_backward.cuh"
#include "gram_forward.cuh"
#include "launch.cuh"

namespace fastprune::cuda {
namespace gram {
namespace {

// Of a multiprocessor; with up to 255 and 168 registers. Three of the others would spill some.
template <Precision P, bool Backward>
constexpr int32_t kBlocksPerSm = Backward || P == Precision::highest ? 2 : 3;

template <class A, Precision P>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm<P, false>)
    gram_forward_kernel(const __grid_constant__ Table table, const __grid_constant__ Call call) {
  __shared__ ForwardShared<A> shared;
  for (int32_t task; (task = static_cast<int32_t>(draw_task(call.next))) < table.tasks;) {
    if (task < table.measures) {
      const int32_t l = layer_of(table, task, &Layer::first_measure);
      const Layer& layer = table.layers[l];
      measure<A>(layer, call, (task - layer.first_measure) * kMeasured, false, shared.sums);
      report(call.progress + 2 * (table.first_layer + l));
      continue;
    }
    const int32_t index = task - table.measures, l = layer_of(table, index, &Layer::first_tile);
    const Layer& layer = table.layers[l];
    uint32_t* progress = call.progress + 2 * (table.first_layer + l);
    wait_for(progress, (layer.filters + kMeasured - 1) / kMeasured);
    if (layer.small)
      forward_tile<A, P, true>(layer, call, index - layer.first_tile, shared);
    else
      forward_tile<A, P, false>(layer, call, index - layer.first_tile, shared);
    const int32_t tiles = layer.panels * (layer.panels + 1) / 2;
    if (!is_last_block(progress + 1, tiles)) continue;
    const double penalty = layer_penalty<A>(layer, call, tiles, shared.sums);
    if (threadIdx.x == 0) call.penalties[table.first_layer + l] = penalty;
    if (is_last_block(call.finished, call.layers)) write_penalty<A>(call, shared.sums);
  }
}

template <class A, Precision P>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm<P, true>)
    gram_backward_kernel(const __grid_constant__ Table table, const __grid_constant__ Call call) {
  __shared__ BackwardShared<A> shared;
  for (int32_t task; (task = static_cast<int32_t>(draw_task(call.next))) < table.tasks;) {
    if (task < table.measures) {
      const int32_t l = layer_of(table, task, &Layer::first_measure);
      const Layer& layer = table.layers[l];
      measure<A>(layer, call, (task - layer.first_measure) * kMeasured, true, shared.sums);
      report(call.progress + 2 * (table.first_layer + l));
      continue;
    }
    const int32_t index = task - table.measures, l = layer_of(table, index, &Layer::first_tile);
    const Layer& layer = table.layers[l];
    wait_for(call.progress + 2 * (table.first_layer + l), (layer.filters + kMeasured - 1) / kMeasured);
    if (layer.small)
      backward_tile<A, P, true>(layer, call, index - layer.first_tile, shared);
    else
      backward_tile<A, P, false>(layer, call, index - layer.first_tile, shared);
  }
}

int64_t accumulator_size(const Problem& problem) { return problem.dtype == Dtype::float64 ? 8 : 4; }

Plan plan_of(const Problem& problem, bool backward) {
  return make_plan(problem.call.layers, bytes_of(problem.dtype), problem.call.kind == Kind::correlation,
                   backward);
}

template <class A, Precision P>
void launch(const Plan& plan, Call call, bool backward, Stream stream) {
  const int32_t processors = count_multiprocessors();
  for (const Launch& of : plan.launches) {
    const Table table = make_table(plan, of);
    const int32_t each = backward ? kBlocksPerSm<P, true> : kBlocksPerSm<P, false>;
    const uint32_t blocks = static_cast<uint32_t>(std::min(table.tasks, each * processors));
    if (backward)
      gram_backward_kernel<A, P><<<blocks, kBlock, 0, stream>>>(table, call);
    else
      gram_forward_kernel<A, P><<<blocks, kBlock, 0, stream>>>(table, call);
    check_launch();
    ++call.next;
  }
}

void launch(const Problem& problem, bool backward, void* scalar, void* coefficients, Stream stream) {
  const Plan plan = plan_of(problem, backward);
  const int64_t size = accumulator_size(problem);
  char* scratch = static_cast<char*>(problem.scratch);
  clear(scratch, 4 * plan.counters(), stream);
  uint32_t* counters = reinterpret_cast<uint32_t*>(scratch);
  const Call call{problem.call.kind == Kind::correlation,
                  problem.call.diagonal,
                  problem.dtype == Dtype::bfloat16  ? Storage::bfloat16
                  : problem.dtype == Dtype::float16 ? Storage::float16
                                                    : Storage::wide,
                  static_cast<int32_t>(plan.layers.size()),
                  problem.mask,
                  coefficients,
                  scalar,
                  counters,
                  counters + plan.launches.size(),
                  counters + plan.launches.size() + 1,
                  scratch + plan.scales_at(),
                  reinterpret_cast<double2*>(scratch + plan.parts_at()),
                  reinterpret_cast<double*>(scratch + plan.slots_at(size)),
                  reinterpret_cast<double*>(scratch + plan.penalties_at(size))};
  if (size == 8) return launch<double, Precision::highest>(plan, call, backward, stream);
  switch (problem.call.precision) {
    case Precision::highest:
      return launch<float, Precision::highest>(plan, call, backward, stream);
    case Precision::high:
      return launch<float, Precision::high>(plan, call, backward, stream);
    default:
      return launch<float, Precision::medium>(plan, call, backward, stream);
  }
}

}  // namespace
}  // namespace gram

int64_t gram_scratch(const Problem& problem, bool backward) {
  return gram::plan_of(problem, backward).bytes(gram::accumulator_size(problem));
}

void gram_forward(const Problem& problem, void* penalty, void* coefficients, Stream stream) {
  gram::launch(problem, false, penalty, coefficients, stream);
}

void gram_backward(const Problem& problem, const void* grad, const void* coefficients, Stream stream) {
  gram::launch(problem, true, const_cast<void*>(grad), const_cast<void*>(coefficients), stream);
}

}  // namespace fastprune::cuda
