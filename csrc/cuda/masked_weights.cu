// masked_weights and its backward: contracts in fastprune/ops/masked_weights.py.
#include "launch.cuh"
#include "masked_weights.h"
#include "vector.cuh"

namespace fastprune::cuda {
namespace {

// 42 registers at most, 48 warps on every multiprocessor since sm_80; float64 needs more.
template <class In>
constexpr int32_t kBlocksPerSm = sizeof(In) == 8 ? 2 : 3;
constexpr int32_t kInFlight = 4;  // vectors that a thread asks for before it waits for the first

// factor · from, rounded once to Out.
template <class Out, class In, int Width>
__device__ Vector<Out, Width> scale(const Vector<In, Width>& from, float factor) {
  Vector<Out, Width> to;
#pragma unroll
  for (int32_t i = 0; i < Width; ++i)
    to.x[i] = narrow<Out>(widen(from.x[i]) * static_cast<decltype(widen(In{}))>(factor));
  return to;
}

// out[k] = factor · in[k], `Width` elements at a time; where the factor is 0, zeros
// without reading the filter.
template <int Width, class In, class Out>
__device__ void scale_row(const In* in, Out* out, int64_t size, float factor, int32_t lane, int32_t lanes) {
  if (factor == 0) {
    const Vector<Out, Width> zeros{};
    for (int64_t k = lane * Width; k < size; k += lanes * Width) store(out + k, zeros);
    return;
  }
  const int64_t step = int64_t{lanes} * Width;
  int64_t k = lane * Width;
  for (; k + (kInFlight - 1) * step < size; k += kInFlight * step) {
    Vector<In, Width> from[kInFlight];
#pragma unroll
    for (int32_t j = 0; j < kInFlight; ++j) from[j] = load<Width>(in + k + j * step);
#pragma unroll
    for (int32_t j = 0; j < kInFlight; ++j) store(out + k + j * step, scale<Out>(from[j], factor));
  }
  for (; k < size; k += step) store(out + k, scale<Out>(load<Width>(in + k), factor));
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<In>)
    masked_weights_kernel(const __grid_constant__ Table table, Factors factors) {
  constexpr int32_t kWidth = kVectorBytes / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const TableLayer& layer = place.layer;
  if (place.row >= layer.rows) return;
  const int32_t filter = layer.first + place.row;
  const float factor = factors.mask[filter] ? 1.0f
                       : factors.feedback   ? factors.feedback[filter]
                                            : factors.pruned;
  const In* in = input<In>(layer, 0) + place.row * layer.size;
  Out* out = output<Out>(layer, 1) + place.row * layer.size;
  if (layer.aligned)
    scale_row<kWidth>(in, out, layer.size, factor, place.lane, place.lanes);
  else
    scale_row<1>(in, out, layer.size, factor, place.lane, place.lanes);
}

}  // namespace

void launch_masked_weights(const Plan& plan, Dtype in, Dtype out, const Factors& factors, Stream stream) {
  visit_dtype(in, [&](auto in_type) {
    visit_dtype(out, [&](auto out_type) {
      using In = typename decltype(in_type)::type;
      using Out = typename decltype(out_type)::type;
      for_launches(plan, [&](const Table& table, const Launch& grid) {
        masked_weights_kernel<In, Out>
            <<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(table, factors);
      });
    });
  });
}

}  // namespace fastprune::cuda
