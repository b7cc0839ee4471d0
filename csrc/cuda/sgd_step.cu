// sgd_step_: contract in fastprune/ops/sgd_step.py.
#include "launch.cuh"
#include "norm.cuh"
#include "sgd_step.h"

namespace fastprune::cuda {
namespace {

constexpr int32_t kBlocksPerSm = 2;  // 64 registers at most, 32 warps on every multiprocessor since sm_80

enum Pointer { kParam, kGrad, kMomentum, kMasked };

template <class T>
constexpr int32_t kWidth = kVectorBytes / sizeof(T);

// Vectors of every tensor that a thread asks for before it waits; eight elements take the registers of two
// vectors of four.
template <class T>
constexpr int32_t kInFlight = sizeof(T) == 2 ? 1 : 2;

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct Step {
  A momentum, undamped, decay;  // undamped: 1 - dampening
  bool nesterov, first, maximize, lr_is_double;
  const void* lr;
  const float* grad_scale;    // or null
  const float* found_inf;     // or null
  const float* filter_decay;  // or null

  __device__ A learning_rate() const {
    return lr_is_double ? static_cast<A>(__ldg(static_cast<const double*>(lr)))
                        : static_cast<A>(__ldg(static_cast<const float*>(lr)));
  }
};

// A row, and what one thread does to it.
template <class T, class Out>
struct Row {
  using A = Arithmetic<T>;
  using Values = Vector<T, kWidth<T>>;
  struct Operands {
    Values param, grad, momentum;
  };

  const Step<A>& step;
  A lr;
  A decay;       // of this row
  A scale;       // of the gradient, negative to maximize
  bool skipped;  // params and momenta stay as they are
  bool kept;
  T* param;
  const T* grad;
  T* momentum;
  Out* masked;

  // The first `count` elements from element k on.
  template <class Kind>
  __device__ Operands read(int64_t k, int32_t count, Kind kind) const {
    constexpr int32_t kEach = kWidth<T>;
    Operands from{};
    from.param = load<kEach, Access::kWritten>(param + k, count, kind);
    if (skipped) return from;
    from.grad = load<kEach>(grad + k, count, kind);
    if (momentum && !step.first) from.momentum = load<kEach, Access::kWritten>(momentum + k, count, kind);
    return from;
  }

  __device__ void update(T& w, T g, T& m) const {
    const A weight = widen(w);
    A d = widen(g) * scale;
    if (decay != 0) d += decay * weight;  // 0 · Inf is not 0
    if (momentum) {
      const A b = step.first ? d : step.momentum * widen(m) + step.undamped * d;
      m = narrow<T>(b);
      d = step.nesterov ? d + step.momentum * b : b;
    }
    w = narrow<T>(weight - lr * d);
  }

  template <class Kind>
  __device__ void write(int64_t k, const Operands& values, int32_t count, Kind kind) const {
    if (!skipped) {
      store(param + k, values.param, count, kind);
      if (momentum) store(momentum + k, values.momentum, count, kind);
    }
    if (!masked) return;
    Vector<Out, kWidth<T>> cast{};
    if (kept)
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) cast.x[i] = narrow<Out>(widen(values.param.x[i]));
    store(masked + k, cast, count, kind);
  }

  // Steps what was read, writes it and adds it to the norm, unless `ord` is 0.
  template <class Part, class Kind>
  __device__ void finish(int64_t k, Operands& values, int32_t count, Kind kind, Part& part,
                         int32_t ord) const {
    if (!skipped)
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i)
        update(values.param.x[i], values.grad.x[i], values.momentum.x[i]);
    write(k, values, count, kind);
    if (ord == 1) part.template add<1>(values.param, count);
    if (ord == 2) part.template add<2>(values.param, count);
  }
};

// One thread's part of the step of `size` elements, and of their norm.
template <class T, class Out>
__device__ double step_row(const Row<T, Out>& row, int64_t size, const Place& place, int32_t ord) {
  NormPart<SumOf<T>, kWidth<T>> part;
  for_vectors<kWidth<T>, kInFlight<T>>(
      place, size, [&](int64_t k, int32_t count, auto kind) { return row.read(k, count, kind); },
      [&](int64_t k, auto& values, int32_t count, auto kind) {
        row.finish(k, values, count, kind, part, ord);
      });
  return part.value();
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sgd_step_kernel(const __grid_constant__ Table table, const __grid_constant__ Step<Arithmetic<T>> step,
                    const __grid_constant__ StepOutputs outputs) {
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const TableLayer& layer = place.layer;
  const Extent extent = extent_of(place, kWidth<T>);
  const int32_t filter = layer.first + place.row;  // where the layer has filters
  Out* masked = output<Out>(layer, kMasked);
  T* momentum = output<T>(layer, kMomentum);
  const float inverse = step.grad_scale ? __frcp_rn(__ldg(step.grad_scale)) : 1.0f;
  T* param = output<T>(layer, kParam) + extent.begin;
  Arithmetic<T> decay = step.decay;
  if (step.filter_decay && layer.first >= 0 && extent.size) decay += __ldg(step.filter_decay + filter);
  const Row<T, Out> row{
      step,
      step.learning_rate(),
      decay,
      step.maximize ? -inverse : inverse,
      step.found_inf && __ldg(step.found_inf) != 0,
      masked && extent.size && outputs.mask[filter],
      param,
      input<T>(layer, kGrad) + extent.begin,
      momentum ? momentum + extent.begin : nullptr,
      masked ? masked + extent.begin : nullptr,
  };
  const bool measured = outputs.norms && layer.first >= 0;  // the same for the whole block
  const double part = step_row(row, extent.size, place, measured ? outputs.ord : 0);
  if (!measured) return;
  const float norm = finite_norm<Access::kWritten>(mean(part, place), param, extent.size, place, outputs.ord);
  if (extent.size && place.lane == 0) outputs.norms[filter] = isfinite(norm) ? norm : NAN;
}

}  // namespace

void launch_sgd_step(const Plan& plan, Dtype dtype, Dtype masked, const SgdStep& step,
                     const StepOutputs& outputs, Stream stream) {
  visit_dtype(dtype, [&](auto type) {
    visit_dtype(masked, [&](auto out) {
      using T = typename decltype(type)::type;
      using Out = typename decltype(out)::type;
      using A = Arithmetic<T>;
      const Step<A> rounded{static_cast<A>(step.momentum),
                            static_cast<A>(1 - step.dampening),
                            static_cast<A>(step.weight_decay),
                            step.nesterov,
                            step.first,
                            step.maximize,
                            step.lr_dtype == Dtype::float64,
                            step.lr,
                            step.grad_scale,
                            step.found_inf,
                            step.filter_decay};
      for_launches(plan, [&](const Table& table, const Launch& grid) {
        sgd_step_kernel<T, Out>
            <<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(table, rounded, outputs);
      });
    });
  });
}

}  // namespace fastprune::cuda
