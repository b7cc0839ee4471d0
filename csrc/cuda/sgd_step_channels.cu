// The norms of input channels that sgd_step_ writes: contract in fastprune/ops/sgd_step.py.
#include "launch.cuh"
#include "norm.cuh"
#include "sgd_step_channels.h"

namespace fastprune::cuda {
namespace {

__device__ inline const ChannelLayer& layer_of(const ChannelTable& table, int32_t block) {
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

// The sum of |w| or w² over what the thread has of a group of channels, `columns` wide: column `slot` (of a
// channel that is wider than all slots, every slots-th from there) of rows `row`, row + `rows_apart`, ...
template <int Ord, class T>
__device__ double sum_columns(const ChannelLayer& layer, const T* group, int64_t columns, int32_t slot,
                              int32_t row, int32_t rows_apart) {
  const int64_t stride = layer.channels * layer.inner;
  DoubleSum sum;  // of few values, and nothing to repeat where one in float32 would overflow
  for (int64_t column = slot; column < columns; column += 1 << layer.shift) {
    const T* from = group + column;
#pragma unroll 4
    for (int64_t r = row; r < layer.rows; r += rows_apart) {
      const double w = widen(__ldg(from + r * stride));
      if constexpr (Ord == 1)
        sum.add(fabs(w));
      else
        sum.add_square(w);
    }
  }
  return sum.value();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_norms_kernel(const __grid_constant__ ChannelTable table, float* norms, int32_t ord) {
  __shared__ double sums[kThreads];
  const ChannelLayer& layer = layer_of(table, blockIdx.x);
  const int32_t thread = threadIdx.x, slots = 1 << layer.shift;
  const int32_t begin = (blockIdx.x - layer.first_block) * layer.group;
  const int32_t channels = min(layer.group, layer.channels - begin);
  const T* group = static_cast<const T*>(layer.weight) + begin * layer.inner;
  const int64_t columns = channels * layer.inner;
  const int32_t slot = thread & (slots - 1), row = thread >> layer.shift;
  const int32_t rows_apart = kThreads >> layer.shift;
  sums[thread] = ord == 1 ? sum_columns<1>(layer, group, columns, slot, row, rows_apart)
                          : sum_columns<2>(layer, group, columns, slot, row, rows_apart);
  for (int32_t half = kThreads / 2; half >= slots; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  if (thread >= channels) return;
  const int64_t end = min((thread + 1) * layer.inner, static_cast<int64_t>(slots));
  double total = 0;
  for (int64_t column = thread * layer.inner; column < end; ++column) total += sums[column];
  const float norm = static_cast<float>(total / static_cast<double>(layer.rows * layer.inner));
  norms[layer.first + begin + thread] = isfinite(norm) ? norm : NAN;
}

}  // namespace

void launch_channel_norms(const ChannelPlan& plan, Dtype dtype, float* norms, int32_t ord, Stream stream) {
  visit_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (const Launch& launch : plan.launches) {
      channel_norms_kernel<T><<<static_cast<uint32_t>(launch.blocks), kThreads, 0, stream>>>(
          make_channel_table(plan, launch), norms, ord);
      check_launch();
    }
  });
}

}  // namespace fastprune::cuda
