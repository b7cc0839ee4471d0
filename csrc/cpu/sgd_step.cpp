// sgd_step_: contract in fastprune/ops/sgd_step.py.
#ifdef FASTPRUNE_ISA

#include "filters.inl"

namespace fastprune::FASTPRUNE_ISA {

// Steps a run of `size` elements; m is null without momentum.
template <class T>
void step_run(const SgdStep& step, int64_t size, T* __restrict w, const T* __restrict g, T* __restrict m) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const A lr = static_cast<A>(step.lr), momentum = static_cast<A>(step.momentum);
  const A undamped = static_cast<A>(1 - step.dampening), decay = static_cast<A>(step.weight_decay);
  const A scale = static_cast<A>(step.scale);
  const bool nesterov = step.nesterov, first = step.first;
  const auto decayed = [&](int64_t k) {
    const A d = static_cast<A>(g[k]) * scale;
    return decay != 0 ? d + decay * static_cast<A>(w[k]) : d;  // 0 · Inf is not 0
  };
  if (!m) {
    for (int64_t k = 0; k < size; ++k) w[k] = static_cast<T>(static_cast<A>(w[k]) - lr * decayed(k));
    return;
  }
  for (int64_t k = 0; k < size; ++k) {
    const A d = decayed(k);
    const A b = first ? d : momentum * static_cast<A>(m[k]) + undamped * d;
    m[k] = static_cast<T>(b);
    w[k] = static_cast<T>(static_cast<A>(w[k]) - lr * (nesterov ? d + momentum * b : b));
  }
}

}  // namespace fastprune::FASTPRUNE_ISA

#else

#include "../sgd_step.h"
#include "host.h"

namespace fastprune {

struct SgdStep {
  double lr, momentum, dampening, weight_decay;
  double scale;  // of the gradients, negative to maximize
  bool nesterov, first;
  bool skipped;  // only the masked weights and the norms are written
};

}  // namespace fastprune

#define FASTPRUNE_FILE "sgd_step.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

// Parameters that are no filters are cut into runs of this many elements, always the same ones: what a run
// computes must not depend on the number of threads.
constexpr int64_t kRun = 4096;

using Tensors = std::vector<Tensor>;

float read_scalar(const std::optional<Tensor>& scalar, float otherwise) {
  return scalar ? *static_cast<const float*>(scalar->const_data_ptr()) : otherwise;
}

// The filters, and behind them the rest of the params as if runs of elements were filters; the last of those
// may be shorter than Layer::size.
std::vector<Layer> make_runs(const Tensors& params, std::vector<Layer> runs) {
  int64_t first = count_filters(runs);
  for (size_t i = runs.size(); i < params.size(); ++i) {
    const int64_t elements = params[i].numel(), size = std::clamp<int64_t>(elements, 1, kRun);
    runs.push_back({params[i].const_data_ptr(), ceil_div(elements, size), size, first});
    first += runs.back().filters;
  }
  return runs;
}

// Where the filters' masked weights and norms go.
struct Outputs {
  const Tensors& masked;
  const bool* kept;
  float* norms;  // null: not wanted
  int64_t ord;
};

template <class T, class Out>
void write_outputs(const Outputs& outputs, size_t i, int64_t f, int64_t n, const T* w, int64_t size) {
  if (!outputs.masked.empty()) {
    Out* row = static_cast<Out*>(outputs.masked[i].mutable_data_ptr()) + f * size;
    if (outputs.kept[n])
      FASTPRUNE_DISPATCH(scale_row, w, size, 1.0f, row);
    else
      std::memset(static_cast<void*>(row), 0, size * sizeof(Out));
  }
  if (outputs.norms) {
    float* norm = outputs.norms + n;
    FASTPRUNE_DISPATCH(score_filters, w, 1, size, outputs.ord, norm);
    if (!std::isfinite(*norm)) *norm = std::nanf("");
  }
}

template <class T, class Out>
void run_step(const SgdStep& step, const Tensors& params, const Tensors& grads, const Tensors& momenta,
              const std::vector<Layer>& runs, size_t layers, const Outputs& outputs) {
  for_filters(runs, [&](size_t i, int64_t begin, int64_t end) {
    T* w = static_cast<T*>(params[i].mutable_data_ptr());
    const T* g = static_cast<const T*>(grads[i].const_data_ptr());
    T* m = momenta.empty() ? nullptr : static_cast<T*>(momenta[i].mutable_data_ptr());
    const int64_t size = runs[i].size, elements = params[i].numel();
    for (int64_t f = begin; f < end; ++f) {
      const int64_t at = f * size;
      if (!step.skipped)
        FASTPRUNE_DISPATCH(step_run, step, std::min(size, elements - at), w + at, g + at, m ? m + at : m);
      // The filter is still in the cache.
      if (i < layers) write_outputs<T, Out>(outputs, i, f, runs[i].first + f, w + at, size);
    }
  });
}

void sgd_step_(Tensors params, Tensors grads, Tensors momenta, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, int64_t layers,
               std::optional<Tensor> mask, Tensors masked, std::optional<Tensor> norms, int64_t ord) {
  const std::vector<Layer> runs =
      make_runs(params, check_sgd_step(params, grads, momenta, momentum, dampening, nesterov, grad_scale,
                                       found_inf, layers, mask, masked, norms, ord));
  const float inverse = 1 / read_scalar(grad_scale, 1);
  const double scale = maximize ? -inverse : inverse;
  const bool skipped = read_scalar(found_inf, 0) != 0;
  if (params.empty()) return;

  const SgdStep step{lr, momentum, dampening, weight_decay, scale, nesterov, first, skipped};
  const Outputs outputs{masked, mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                        norms ? static_cast<float*>(norms->mutable_data_ptr()) : nullptr, ord};
  visit_dtype(params[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    visit_dtype(masked.empty() ? ScalarType::Float : masked[0].scalar_type(), [&](auto out) {
      run_step<T, typename decltype(out)::type>(step, params, grads, momenta, runs, layers, outputs);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) { library.impl("sgd_step_", TORCH_BOX(&sgd_step_)); }

}  // namespace fastprune

#endif
