// The kind orthogonality of decorrelation: contract in fastprune/ops/decorrelation.py.
//
// R = |b|^2 / |a|^2 with a = A u, b = A a, A = W'W - I, which is never formed: a pass over the rows applies
// it, each task for rows of its own, into a slot of its own; the last of a layer's tasks adds up the slots.
#include "decorrelation.h"
#include "decorrelation_orthogonality.cuh"
#include "launch.cuh"
#include "tasks.cuh"

namespace fastprune::cuda::orthogonality {
namespace {

// 128 registers at most: eight rows in flight need them, and 16 warps with 8 loads of 16 bytes each hide the
// latency of memory.
constexpr int32_t kBlocksPerSm = 1;

constexpr double kWeylStep = 0.6180339887498949;  // (sqrt(5) - 1) / 2

// What all layers share.
template <class A>
struct Work {
  const bool* mask;    // [N] or null
  A* coefficients;     // forward: a and b of every layer
  const A* saved;      // backward: the same
  const A* grad;       // backward
  A* penalty;          // forward
  A* scratch;          // per layer: u, a, backward db and da, then the slots
  double* norms;       // per layer: its penalty; backward |a|^2 and |b|^2
  uint32_t* next;      // task of this launch
  uint32_t* finished;  // layers of the model
  uint32_t* progress;  // per layer: stages done, then tasks done of either pass
  int32_t layers;      // of the model
};

// The fixed start of the iteration, in the order of memory: frac((k + 1) / golden ratio) - 1/2.
template <class A>
__device__ void start_vector(const Layer& layer, A* u) {
  const int32_t kw = layer.sizes[1], kernel = layer.sizes[0] * kw;
  for (int32_t k = threadIdx.x; k < layer.stride; k += kThreads) {
    const double step = __dmul_rn(k + 1.0, kWeylStep);  // rounded, so that it is what the reference has
    const int32_t place =
        k / kernel * layer.strides[0] + k % kernel / kw * layer.strides[1] + k % kw * layer.strides[2];
    if (k < layer.size)
      u[place] = static_cast<A>(step - floor(step) - 0.5);
    else
      u[k] = 0;
  }
}

// What the backward's passes need: |a|^2, |b|^2, a, and db = 2 b / |a|^2.
template <class A>
__device__ void prepare_gradient(const Layer& layer, const A* coefficients, A* vectors, double* norms) {
  double aa = 0, bb = 0;
  for (int32_t k = threadIdx.x; k < layer.size; k += kThreads) {
    const double a = coefficients[k], b = coefficients[layer.size + k];
    aa += a * a;
    bb += b * b;
  }
  aa = sum_threads(aa, kThreadsShift);
  bb = sum_threads(bb, kThreadsShift);
  for (int32_t k = threadIdx.x; k < layer.stride; k += kThreads) {
    const bool inside = k < layer.size;
    vectors[layer.stride + k] = inside ? coefficients[k] : A(0);
    vectors[2 * layer.stride + k] =
        inside && aa > 0 ? static_cast<A>(2.0 * coefficients[layer.size + k] / aa) : A(0);
  }
  if (threadIdx.x == 0) {
    norms[0] = aa;
    norms[1] = bb;
  }
}

// Element k of the sum of a layer's slots.
template <class A>
__device__ double sum_slots(const Layer& layer, const A* slots, int32_t k) {
  double total = 0;
#pragma unroll 4
  for (int32_t task = 0; task < layer.tasks; ++task)
    total += slots[static_cast<int64_t>(task) * layer.stride + k];
  return total;
}

// out = A x from the slots of W'W x; all of it also where `saved` says, and its square's sum is returned.
template <class A>
__device__ double finish_apply(const Layer& layer, const A* slots, const A* x, A* out, A* saved) {
  double norm = 0;
  for (int32_t k = threadIdx.x; k < layer.stride; k += kThreads) {
    const A y = static_cast<A>(sum_slots(layer, slots, k) - x[k]);
    if (out != nullptr) out[k] = y;
    if (k < layer.size) saved[k] = y;
    norm += static_cast<double>(y) * y;
  }
  return norm;
}

// By the last block of a layer's second pass: its penalty, and by the last layer's the sum of all.
template <class A>
__device__ void finish_penalty(const Work<A>& work, int32_t layer, double aa, double bb) {
  aa = sum_threads(aa, kThreadsShift);
  bb = sum_threads(bb, kThreadsShift);
  if (threadIdx.x == 0) work.norms[2 * layer] = aa > 0 ? bb / aa : 0;
  if (!is_last_block(work.finished, work.layers)) return;
  double total = 0;
  for (int32_t i = threadIdx.x; i < work.layers; i += kThreads) total += work.norms[2 * i];
  total = sum_threads(total, kThreadsShift);
  if (threadIdx.x == 0) *work.penalty = static_cast<A>(total);
}

// The last entry that begins at or before the task.
__device__ Stage stage_of(const Table& table, int32_t task) {
  int32_t low = 0, high = table.stages - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (table.order[middle].first_task <= task)
      low = middle;
    else
      high = middle - 1;
  }
  return table.order[low];
}

template <class T, class A>
__device__ void apply_rows(const Layer& layer, const Share& share, const A* x, A* slot) {
  if (layer.aligned)
    apply<true, T>(layer, share, x, slot);
  else
    apply<false, T>(layer, share, x, slot);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    orthogonality_kernel(const __grid_constant__ Table table, Work<Accumulator<T>> work) {
  using A = Accumulator<T>;
  for (;;) {
    const uint32_t task = draw_task(work.next);
    if (task >= static_cast<uint32_t>(table.tasks)) return;
    const Stage stage = stage_of(table, task);
    const Layer& layer = table.layers[stage.layer];
    const int32_t index = table.first_layer + stage.layer;
    uint32_t* progress = work.progress + kStages * index;
    A *u = work.scratch + layer.scratch, *a = u + layer.stride, *slots = a + layer.stride;
    if (stage.stage == 0) {
      start_vector(layer, u);
      publish(progress, 1);
      continue;
    }
    const int32_t part = task - stage.first_task;
    const Share share = share_of(layer, part, work.mask);
    const bool second = stage.stage == 2;
    wait_for(progress, stage.stage);
    apply_rows<T>(layer, share, second ? a : u, slots + static_cast<int64_t>(part) * layer.stride);
    if (!is_last_block(progress + stage.stage, layer.tasks)) continue;
    A* saved = work.coefficients + layer.coefficients;
    if (!second) {
      finish_apply<A>(layer, slots, u, a, saved);
      publish(progress, 2);
    } else {
      double aa = 0;
      for (int32_t k = threadIdx.x; k < layer.size; k += kThreads) aa += static_cast<double>(a[k]) * a[k];
      const double bb = finish_apply<A>(layer, slots, a, nullptr, saved + layer.size);
      finish_penalty(work, index, aa, bb);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    orthogonality_backward_kernel(const __grid_constant__ Table table, Work<Accumulator<T>> work) {
  using A = Accumulator<T>;
  for (;;) {
    const uint32_t task = draw_task(work.next);
    if (task >= static_cast<uint32_t>(table.tasks)) return;
    const Stage stage = stage_of(table, task);
    const Layer& layer = table.layers[stage.layer];
    const int32_t index = table.first_layer + stage.layer;
    uint32_t* progress = work.progress + kStages * index;
    double* norms = work.norms + 2 * index;
    A *u = work.scratch + layer.scratch, *a = u + layer.stride, *db = a + layer.stride,
      *da = db + layer.stride, *slots = da + layer.stride;
    if (stage.stage == 0) {
      start_vector(layer, u);
      prepare_gradient(layer, work.saved + layer.coefficients, u, norms);
      publish(progress, 1);
      continue;
    }
    const int32_t part = task - stage.first_task;
    const Share share = share_of(layer, part, work.mask);
    wait_for(progress, stage.stage);
    if (stage.stage == 2) {
      if (layer.aligned)
        write_rows<true, T>(layer, share, u, *work.grad);
      else
        write_rows<false, T>(layer, share, u, *work.grad);
      continue;
    }
    apply_rows<T>(layer, share, db, slots + static_cast<int64_t>(part) * layer.stride);
    if (!is_last_block(progress + 1, layer.tasks)) continue;
    const double aa = norms[0], factor = aa > 0 ? 2 * norms[1] / (aa * aa) : 0;
    for (int32_t k = threadIdx.x; k < layer.stride; k += kThreads)
      da[k] = static_cast<A>(sum_slots(layer, slots, k) - db[k] - factor * a[k]);
    publish(progress, 2);
  }
}

Plan plan_of(const Problem& problem, bool backward) {
  return make_plan(problem.call.layers, bytes_of(problem.dtype), backward);
}

template <class A>
Work<A> work_of(const Problem& problem, const Plan& plan, Stream stream) {
  uint8_t* scratch = static_cast<uint8_t*>(problem.scratch);
  uint32_t* counters = reinterpret_cast<uint32_t*>(scratch + plan.counters(sizeof(A)));
  clear(counters, plan.counter_bytes(), stream);
  Work<A> work{};
  work.mask = problem.mask;
  work.scratch = reinterpret_cast<A*>(scratch);
  work.norms = reinterpret_cast<double*>(scratch + plan.norms(sizeof(A)));
  work.next = counters;
  work.finished = counters + plan.launches.size();
  work.progress = work.finished + 1;
  work.layers = static_cast<int32_t>(plan.layers.size());
  return work;
}

// As many blocks as run at once, each of which draws tasks until none is left.
uint32_t grid_of(const Launch& launch, int32_t blocks_per_sm) {
  return static_cast<uint32_t>(
      std::min<int64_t>(launch.tasks, int64_t{count_multiprocessors()} * blocks_per_sm));
}

// Calls f(table, work, grid) for every launch of the plan.
template <class T, class F>
void for_launches(const Plan& plan, Work<Accumulator<T>> work, const F& f) {
  for (const Launch& launch : plan.launches) {
    const uint32_t grid = grid_of(launch, kBlocksPerSm);
    f(make_table(plan, launch), work, grid);
    check_launch();
    ++work.next;
  }
}

}  // namespace
}  // namespace fastprune::cuda::orthogonality

namespace fastprune::cuda {

int64_t orthogonality_scratch(const Problem& problem, bool backward) {
  const orthogonality::Plan plan = orthogonality::plan_of(problem, backward);
  return plan.counters(problem.dtype == Dtype::float64 ? sizeof(double) : sizeof(float)) +
         plan.counter_bytes();
}

void orthogonality_forward(const Problem& problem, void* penalty, void* coefficients, Stream stream) {
  visit_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = orthogonality::Accumulator<T>;
    const orthogonality::Plan plan = orthogonality::plan_of(problem, false);
    orthogonality::Work<A> work = orthogonality::work_of<A>(problem, plan, stream);
    work.penalty = static_cast<A*>(penalty);
    work.coefficients = static_cast<A*>(coefficients);
    orthogonality::for_launches<T>(
        plan, work, [&](const orthogonality::Table& table, const auto& each, uint32_t grid) {
          orthogonality::orthogonality_kernel<T><<<grid, kThreads, 0, stream>>>(table, each);
        });
  });
}

void orthogonality_backward(const Problem& problem, const void* grad, const void* coefficients,
                            Stream stream) {
  visit_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = orthogonality::Accumulator<T>;
    const orthogonality::Plan plan = orthogonality::plan_of(problem, true);
    orthogonality::Work<A> work = orthogonality::work_of<A>(problem, plan, stream);
    work.grad = static_cast<const A*>(grad);
    work.saved = static_cast<const A*>(coefficients);
    orthogonality::for_launches<T>(
        plan, work, [&](const orthogonality::Table& table, const auto& each, uint32_t grid) {
          orthogonality::orthogonality_backward_kernel<T><<<grid, kThreads, 0, stream>>>(table, each);
        });
  });
}

}  // namespace fastprune::cuda
