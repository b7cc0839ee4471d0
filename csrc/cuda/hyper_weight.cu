// hyper_weight and its backward: contracts in fastprune/ops/hyper_weight.py.
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
  const int32_t blocks = gridDim.y, block = blockIdx.y;
  const bool clears_only = block >= g.tiles;
  if (!clears_only) stage_panel(g, hidden, blockIdx.x, staged);
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

}  // namespace

void launch_forward(const Geometry& g, Dtype dtype, Dtype out, const Operands& from, void* generated,
                    Stream stream) {
  visit_dtype(dtype, [&](auto type) {
    visit_dtype(out, [&](auto out_type) {
      using T = typename decltype(type)::type;
      using Out = typename decltype(out_type)::type;
      hyper_weight_kernel<T, Out><<<static_cast<uint32_t>(g.tiles), kThreads, 0, stream>>>(
          g, static_cast<const T*>(from.hidden), static_cast<const T*>(from.weight),
          static_cast<const T*>(from.bias), static_cast<Out*>(generated));
    });
  });
  check_launch();
}

void launch_backward(const Geometry& g, Dtype dtype, Dtype in, const void* grad, const Operands& from,
                     const Results& to, Stream stream) {
  clear(to.tickets, g.panels() * sizeof(uint32_t), stream);
  const dim3 grid(g.grid().x, g.grid().y);
  visit_dtype(dtype, [&](auto type) {
    visit_dtype(in, [&](auto in_type) {
      using T = typename decltype(type)::type;
      using In = typename decltype(in_type)::type;
      const Gradients<T> gradients{static_cast<T*>(to.hidden), static_cast<T*>(to.weight),
                                   static_cast<T*>(to.bias), to.slots, to.tickets};
      hyper_weight_backward_kernel<T, In>
          <<<grid, kThreads, 0, stream>>>(g, static_cast<const In*>(grad), static_cast<const T*>(from.hidden),
                                          static_cast<const T*>(from.weight), gradients, g.slots());
    });
  });
  check_launch();
}

}  // namespace hyper
}  // namespace fastprune::cuda
