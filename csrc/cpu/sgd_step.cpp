// sgd_step_: contract in fastprune/ops/sgd_step.py.
#ifdef FASTPRUNE_ISA

#include "filters.inl"

namespace fastprune::FASTPRUNE_ISA {

// Steps a run of `size` elements; m is null without momentum.
template <class T>
void step_run(const SgdStep& step, float filter_decay, int64_t size, T* __restrict w, const T* __restrict g,
              T* __restrict m) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const A lr = static_cast<A>(step.lr), momentum = static_cast<A>(step.momentum);
  const A undamped = static_cast<A>(1 - step.dampening);
  const A decay = static_cast<A>(step.weight_decay) + static_cast<A>(filter_decay);
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

// sums[k] += |w[k]| or w[k]² of each of `rows` runs of `size` elements that begin `stride` elements apart.
template <class T>
void add_columns(const T* w, int64_t rows, int64_t stride, int64_t size, int64_t ord, double* sums) {
  const auto add = [&](const auto& magnitude) {
    constexpr int64_t kBlock = 64 * lanes<double>;  // whose sums stay in the first cache
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, size);
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = w + row * stride;
        int64_t k = begin;
        for (; k + lanes<double> <= end; k += lanes<double>)
          store<double>(sums + k, load<double>(sums + k) + magnitude(load<double>(from + k)));
        for (; k < end; ++k) sums[k] += magnitude(Vector<double>{static_cast<double>(from[k])})[0];
      }
    }
  };
  if (ord == 1)
    add([](const Vector<double>& x) { return absolute<double>(x); });
  else
    add([](const Vector<double>& x) { return x * x; });
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

using sgd_step::Arguments;
using sgd_step::Tensors;

// Parameters that are no filters are cut into runs of this many elements, always the same ones: what a run
// computes must not depend on the number of threads.
constexpr int64_t kRun = 4096;

// Of what is only read; null where there is none.
template <class T>
const T* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

float read_scalar(const std::optional<Tensor>& scalar, float otherwise) {
  return scalar ? *pointer_of<float>(scalar) : otherwise;
}

SgdStep step_of(const Arguments& step) {
  const void* lr = step.lr.const_data_ptr();
  const float inverse = 1 / read_scalar(step.grad_scale, 1);
  return {step.lr.scalar_type() == ScalarType::Double ? *static_cast<const double*>(lr)
                                                      : *static_cast<const float*>(lr),
          step.momentum,
          step.dampening,
          step.weight_decay,
          step.maximize ? -inverse : inverse,
          step.nesterov,
          step.first,
          read_scalar(step.found_inf, 0) != 0};
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

float finite_or_nan(float norm) { return std::isfinite(norm) ? norm : std::nanf(""); }

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
    *norm = finite_or_nan(*norm);
  }
}

template <class T, class Out>
void run_step(const Arguments& arguments, const std::vector<Layer>& weights) {
  const SgdStep step = step_of(arguments);
  const Outputs outputs{arguments.masked, pointer_of<bool>(arguments.mask),
                        arguments.norms ? static_cast<float*>(arguments.norms->mutable_data_ptr()) : nullptr,
                        arguments.ord};
  const float* decays = pointer_of<float>(arguments.filter_decay);
  const std::vector<Layer> runs = make_runs(arguments.params, weights);
  for_filters(runs, [&](size_t i, int64_t begin, int64_t end) {
    T* w = static_cast<T*>(arguments.params[i].mutable_data_ptr());
    const T* g = static_cast<const T*>(arguments.grads[i].const_data_ptr());
    T* m = arguments.momenta.empty() ? nullptr : static_cast<T*>(arguments.momenta[i].mutable_data_ptr());
    const bool filters = i < weights.size();
    const int64_t size = runs[i].size, elements = arguments.params[i].numel();
    for (int64_t f = begin; f < end; ++f) {
      const int64_t at = f * size, n = runs[i].first + f;
      if (!step.skipped)
        FASTPRUNE_DISPATCH(step_run, step, filters && decays ? decays[n] : 0, std::min(size, elements - at),
                           w + at, g + at, m ? m + at : m);
      // The filter is still in the cache.
      if (filters) write_outputs<T, Out>(outputs, i, f, n, w + at, size);
    }
  });
}

// A second sweep: each column of a weight's rows is added up by one thread, whichever it is.
template <class T>
void write_channel_norms(const Arguments& step, const std::vector<Layer>& weights) {
  const std::vector<ChannelView> views = channel_views(step.params, weights);
  std::vector<Layer> columns;
  int64_t first = 0;
  for (const ChannelView& view : views) {
    columns.push_back({view.data, view.channels * view.inner, view.rows, first});
    first += columns.back().filters;
  }
  std::vector<double> sums(first);
  for_filters(columns, [&](size_t i, int64_t begin, int64_t end) {
    FASTPRUNE_DISPATCH(add_columns, static_cast<const T*>(columns[i].data) + begin, columns[i].size,
                       columns[i].filters, end - begin, step.ord, sums.data() + columns[i].first + begin);
  });
  float* norms = static_cast<float*>(step.channel_norms->mutable_data_ptr());
  const double* sum = sums.data();
  for (const ChannelView& view : views)
    for (int64_t channel = 0; channel < view.channels; ++channel, sum += view.inner) {
      double total = 0;
      for (int64_t k = 0; k < view.inner; ++k) total += sum[k];
      *norms++ = finite_or_nan(static_cast<float>(total / static_cast<double>(view.rows * view.inner)));
    }
}

void run(const Arguments& step, const std::vector<Layer>& weights) {
  visit_dtype(step.params[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    visit_dtype(step.masked.empty() ? ScalarType::Float : step.masked[0].scalar_type(),
                [&](auto out) { run_step<T, typename decltype(out)::type>(step, weights); });
    if (step.channel_norms) write_channel_norms<T>(step, weights);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("sgd_step_", TORCH_BOX(&sgd_step::op<run>));
}

}  // namespace fastprune

#endif
