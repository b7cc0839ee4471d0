// The kind kernel-covariance of decorrelation: contract in fastprune/ops/decorrelation.py.
//
// A block reads a run of slices [kh, kw] into shared memory, a thread works on a slice there, and the block
// writes the gradient back as it read: every weight once, forward and backward.
#include "decorrelation.h"
#include "decorrelation_kernel_covariance.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace fastprune::cuda::kernel_covariance {
namespace {

// 64 registers and 38 KB of shared memory: 32 warps on a multiprocessor; half of them for float64.
template <class T>
constexpr int32_t kBlocksPerSm = sizeof(T) == 8 ? 1 : 2;

// What all layers share.
template <class A>
struct Work {
  const bool* mask;  // [N] or null
  const A* grad;     // backward
  A* penalty;        // forward
  double* shares;    // of every block
  uint32_t* ticket;
  int32_t blocks;  // of all launches
  bool diagonal;
};

// This thread's part of the sum of |products| over a run; `Size` is 0 where it is not known.
template <class T, int32_t Size>
__device__ double run_penalty(const Run& run, Accumulator<T>* tile, bool diagonal) {
  using A = Accumulator<T>;
  double sum = 0;
  for_slices<T, Size>(run, tile, [&](A* slice, int32_t, bool kept) {
    if (!kept) return;
    if constexpr (Size > 0)
      sum += FixedSlice<Size, Size, A>(slice).penalty(diagonal);
    else
      sum += AnySlice<A>(slice, run.layer.kh, run.layer.kw).penalty(diagonal);
  });
  return sum;
}

template <class T, int32_t Size>
__device__ void run_gradient(const Run& run, Accumulator<T>* tile, bool diagonal, Accumulator<T> scale) {
  using A = Accumulator<T>;
  const bool dense = run.layer.way == Way::dense;
  A* result = tile + (Size > 0 ? 0 : Tile<A>::kSize / 2);
  for_slices<T, Size>(run, tile, [&](A* slice, int32_t i, bool kept) {
    A* out = result + i * run.elements;
    if (!kept)
      for (int32_t e = 0; e < run.elements; ++e) out[e] = 0;
    else if constexpr (Size > 0)
      FixedSlice<Size, Size, A>(slice).gradient(out, diagonal, scale);
    else
      AnySlice<A>(slice, run.layer.kh, run.layer.kw).gradient(out, diagonal, scale);
    if (dense) return;
    T* to = static_cast<T*>(run.layer.out) + run.place(i);
    for_elements<Size>(run.layer, [&](int32_t e, int64_t offset) { to[offset] = narrow<T>(out[e]); });
  });
  if (!dense) return;
  __syncthreads();
  write_run<T>(run, result);
}

__device__ const Layer& layer_of(const Table& table, int32_t block) {
  int32_t low = 0, high = table.count - 1;  // the last layer that begins at or before the block
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (table.layers[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return table.layers[low];
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    kernel_covariance_kernel(const __grid_constant__ Table table, Work<Accumulator<T>> work,
                             int32_t first_block) {
  __shared__ Tile<Accumulator<T>> tile;
  const Layer& layer = layer_of(table, blockIdx.x);
  const Run run = run_of(layer, blockIdx.x - layer.first_block, work.mask, tile);
  double share = 0;
  if (layer.way != Way::huge) {
    if (layer.kh == 3 && layer.kw == 3)
      share = run_penalty<T, 3>(run, tile.x, work.diagonal);
    else if (layer.kh == 5 && layer.kw == 5)
      share = run_penalty<T, 5>(run, tile.x, work.diagonal);
    else
      share = run_penalty<T, 0>(run, tile.x, work.diagonal);
  } else if (run.takes_part(0)) {
    share = HugeSlice<T>{static_cast<const T*>(layer.in) + run.place(0), layer}.penalty(work.diagonal);
  }
  share = sum_threads(share, kThreadsShift) / (layer.kw - 1);
  if (threadIdx.x == 0) work.shares[first_block + blockIdx.x] = share;
  if (!is_last_block(work.ticket, work.blocks)) return;
  double total = 0;
  for (int32_t i = threadIdx.x; i < work.blocks; i += kThreads) total += work.shares[i];
  total = sum_threads(total, kThreadsShift);
  if (threadIdx.x == 0) *work.penalty = static_cast<Accumulator<T>>(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    kernel_covariance_backward_kernel(const __grid_constant__ Table table, Work<Accumulator<T>> work) {
  using A = Accumulator<T>;
  __shared__ Tile<A> tile;
  const Layer& layer = layer_of(table, blockIdx.x);
  const int32_t block = blockIdx.x - layer.first_block;
  if (layer.way == Way::zeros) {
    write_zeros<T>(layer, block);
    return;
  }
  const Run run = run_of(layer, block, work.mask, tile);
  const A scale = *work.grad / static_cast<A>(layer.kw - 1);
  if (layer.way == Way::huge) {
    const int64_t place = run.place(0);
    const HugeSlice<T> slice{static_cast<const T*>(layer.in) + place, layer};
    slice.gradient(static_cast<T*>(layer.out) + place, run.takes_part(0), work.diagonal, scale);
  } else if (layer.kh == 3 && layer.kw == 3) {
    run_gradient<T, 3>(run, tile.x, work.diagonal, scale);
  } else if (layer.kh == 5 && layer.kw == 5) {
    run_gradient<T, 5>(run, tile.x, work.diagonal, scale);
  } else {
    run_gradient<T, 0>(run, tile.x, work.diagonal, scale);
  }
}

Plan plan_of(const Problem& problem) { return make_plan(problem.call.layers, bytes_of(problem.dtype)); }

// Calls f(table, launch) for every grid of the plan.
template <class F>
void for_launches(const Plan& plan, const F& f) {
  for (const Launch& launch : plan.launches) {
    f(make_table(plan, launch), launch);
    check_launch();
  }
}

template <class T>
void launch_forward(const Problem& problem, void* penalty, Stream stream) {
  using A = Accumulator<T>;
  const Plan plan = plan_of(problem);
  if (plan.blocks == 0) {
    clear(penalty, sizeof(A), stream);
    return;
  }
  double* shares = static_cast<double*>(problem.scratch);
  uint32_t* ticket = reinterpret_cast<uint32_t*>(shares + plan.blocks);
  clear(ticket, sizeof(*ticket), stream);
  const Work<A> work{problem.mask,
                     nullptr,
                     static_cast<A*>(penalty),
                     shares,
                     ticket,
                     static_cast<int32_t>(plan.blocks),
                     problem.call.diagonal};
  for_launches(plan, [&](const Table& table, const Launch& launch) {
    kernel_covariance_kernel<T><<<static_cast<uint32_t>(launch.blocks), kThreads, 0, stream>>>(
        table, work, static_cast<int32_t>(launch.first_block));
  });
}

template <class T>
void launch_backward(const Problem& problem, const void* grad, Stream stream) {
  using A = Accumulator<T>;
  Work<A> work{};
  work.mask = problem.mask;
  work.grad = static_cast<const A*>(grad);
  work.diagonal = problem.call.diagonal;
  for_launches(plan_of(problem), [&](const Table& table, const Launch& launch) {
    kernel_covariance_backward_kernel<T>
        <<<static_cast<uint32_t>(launch.blocks), kThreads, 0, stream>>>(table, work);
  });
}

}  // namespace
}  // namespace fastprune::cuda::kernel_covariance

namespace fastprune::cuda {

int64_t kernel_covariance_scratch(const Problem& problem, bool backward) {
  return backward ? 0 : kernel_covariance::plan_of(problem).ticket() + sizeof(uint32_t);
}

void kernel_covariance_forward(const Problem& problem, void* penalty, Stream stream) {
  visit_dtype(problem.dtype, [&](auto type) {
    kernel_covariance::launch_forward<typename decltype(type)::type>(problem, penalty, stream);
  });
}

void kernel_covariance_backward(const Problem& problem, const void* grad, Stream stream) {
  visit_dtype(problem.dtype, [&](auto type) {
    kernel_covariance::launch_backward<typename decltype(type)::type>(problem, grad, stream);
  });
}

}  // namespace fastprune::cuda
