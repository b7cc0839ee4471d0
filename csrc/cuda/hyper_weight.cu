// hyper_weight and its backward: contracts in fastprune/ops/hyper_weight.py.
#include "../hyper_weight.h"
#include "hyper_weight.cuh"
#include "hyper_weight_backward.cuh"
#include "launch.cuh"

namespace fastprune::cuda {
namespace hyper {
namespace {

// 80 registers at most, 24 warps on every multiprocessor; the backward of 16 bits needs more.
template <class T, bool Backward>
constexpr int32_t kBlocksPerSm = Backward && sizeof(T) == 2 ? 2 : 3;

// Adds to the tile in shared memory the products of its rows with one panel of `hidden`; the first one begins
// with the bias.
template <class T, class Kind>
__device__ void generate_panel(const Tile& tile, const T* weight, const T* bias, int32_t panel,
                               const Arithmetic<T>* hidden, Arithmetic<T>* sums, Kind kind) {
  using A = Arithmetic<T>;
  const Lane lane(tile.g.shift);
  const Columns<T> columns(tile.g, panel, lane);
  A x[kWidth<T>];
  read_columns(hidden, lane.lane, x);
  for (int32_t first = 0; first < tile.rows; first += lane.together()) {
    const Row own = row_of(tile, lane.own(first));
    const bool owns = lane.owns() && own.index >= 0;
    const A start = !owns ? A{0} : panel == 0 ? A{widen(__ldg(bias + own.index))} : sums[own.place];
    Vector<T, kWidth<T>> rows[kRows];
#pragma unroll
    for (int32_t u = 0; u < kRows; ++u) {
      const int32_t row = lane.of(own.index, u);
      rows[u] = {};
      if (row >= 0 && columns.count)
        rows[u] = load<kWidth<T>>(weight + int64_t{row} * tile.g.size + columns.first, columns.count, kind);
    }
    A products[kRows] = {};
#pragma unroll
    for (int32_t u = 0; u < kRows; ++u)
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) products[u] += widen(rows[u].x[i]) * x[i];
    const A product = lane.sum(products);
    if (owns) sums[own.place] = start + product;
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T, false>)
    hyper_weight_kernel(const __grid_constant__ Geometry g, const T* hidden, const T* weight, const T* bias,
                        Out* generated) {
  using A = Arithmetic<T>;
  __shared__ A sums[kPlaces];
  __shared__ alignas(16) A staged[kColumns<T>];
  const Tile tile(g, blockIdx.x);
  const int32_t panels = (g.vectors + kPanelVectors - 1) / kPanelVectors;
  for (int32_t panel = 0; panel < panels; ++panel) {
    stage_panel(g, hidden, panel, staged);
    __syncthreads();
    if (g.aligned)
      generate_panel(tile, weight, bias, panel, staged, sums, Whole{});
    else
      generate_panel(tile, weight, bias, panel, staged, sums, Elements{});
    __syncthreads();
  }
  tile.for_elements([&](int32_t element, int32_t place) { generated[element] = narrow<Out>(sums[place]); });
}

template <class T, class In>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T, true>)
    hyper_weight_backward_kernel(const __grid_constant__ Geometry g, const In* grad, const T* hidden,
                                 const T* weight, const __grid_constant__ Gradients<T> to, int32_t slots) {
  using A = Arithmetic<T>;
  __shared__ A grads[kPlaces];
  __shared__ alignas(16) A staged[kColumns<T>];
  __shared__ double sums[kThreads / 32 * kColumns<T>];
  const int32_t blocks = gridDim.x, block = blockIdx.x;
  const bool clears_only = block >= g.tiles;
  if (!clears_only) stage_panel(g, hidden, blockIdx.y, staged);
  __syncthreads();
  Backward<T> backward(g, weight, to, clears_only ? nullptr : staged);
  int32_t item = block;
  for (; item < g.tiles; item += blocks) {
    const Tile tile(g, item);
    tile.for_elements(
        [&](int32_t element, int32_t place) { grads[place] = static_cast<A>(widen(__ldg(grad + element))); });
    __syncthreads();
    if (g.aligned)
      backward.differentiate(tile, grads, Whole{});
    else
      backward.differentiate(tile, grads, Elements{});
    __syncthreads();
  }
  for (; item < g.tiles + g.zero_tiles; item += blocks) {
    if (g.aligned)
      backward.clear(item - g.tiles, Whole{});
    else
      backward.clear(item - g.tiles, Elements{});
  }
  if (block < slots) backward.reduce(slots, sums);
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

using Shape = std::vector<int64_t>;

Tensor forward(Tensor hidden, Tensor weight, Tensor bias, int64_t out_channels, int64_t in_channels,
               Shape shape, ScalarType dtype, bool channels_last) {
  const HyperSlice slice =
      check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype, channels_last);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor generated = empty_generated(slice, weight, shape, dtype, channels_last);
  const Geometry g = make_geometry(slice, weight.element_size(), is_aligned(weight));
  const cudaStream_t stream = current_stream(weight);
  visit_dtype(weight.scalar_type(), [&](auto type) {
    visit_dtype(dtype, [&](auto out_type) {
      using T = typename decltype(type)::type;
      using Out = typename decltype(out_type)::type;
      hyper_weight_kernel<T, Out><<<static_cast<uint32_t>(g.tiles), kThreads, 0, stream>>>(
          g, pointer<T>(hidden), pointer<T>(weight), pointer<T>(bias), mutable_pointer<Out>(generated));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return generated;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor hidden, Tensor weight, Shape shape) {
  const HyperSlice slice = check_hyper_weight_backward(grad, hidden, weight, shape);
  const DeviceGuard guard(weight.get_device_index());
  const ScalarType dtype = weight.scalar_type();
  const Tensor to_hidden = empty_like(hidden, dtype), to_weight = empty_like(weight, dtype);
  const Tensor to_bias = torch::stable::new_empty(weight, {slice.rows()});
  const int64_t element_size = weight.element_size();
  const Geometry g = make_geometry(slice, element_size, is_aligned(weight) && is_aligned(to_weight));
  const int64_t slots = int64_t{g.slots()} * g.columns(kVectorBytes / element_size);
  const Tensor scratch = torch::stable::new_empty(weight, {slots + (g.panels() + 1) / 2}, ScalarType::Double);
  double* sums = mutable_pointer<double>(scratch);
  uint32_t* tickets = reinterpret_cast<uint32_t*>(sums + slots);
  const cudaStream_t stream = current_stream(weight);
  STD_CUDA_CHECK(cudaMemsetAsync(tickets, 0, g.panels() * sizeof(uint32_t), stream));
  const dim3 grid(g.blocks(), g.panels());
  visit_dtype(dtype, [&](auto type) {
    visit_dtype(grad.scalar_type(), [&](auto in_type) {
      using T = typename decltype(type)::type;
      using In = typename decltype(in_type)::type;
      const Gradients<T> gradients{mutable_pointer<T>(to_hidden), mutable_pointer<T>(to_weight),
                                   mutable_pointer<T>(to_bias), sums, tickets};
      hyper_weight_backward_kernel<T, In><<<grid, kThreads, 0, stream>>>(
          g, pointer<In>(grad), pointer<T>(hidden), pointer<T>(weight), gradients, g.slots());
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {to_hidden, to_weight, to_bias};
}

}  // namespace
}  // namespace hyper

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("hyper_weight", TORCH_BOX(&hyper::forward));
  library.impl("hyper_weight_backward", TORCH_BOX(&hyper::backward));
}

}  // namespace fastprune::cuda
