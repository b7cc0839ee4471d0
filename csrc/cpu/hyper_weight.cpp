// hyper_weight and its backward: contracts in fastprune/ops/hyper_weight.py.
#ifdef FASTPRUNE_ISA

#include "hyper_weight.inl"

#else

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <vector>

#include "../hyper_weight.h"
#include "host.h"

#define FASTPRUNE_FILE "hyper_weight.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kPiece = 128;  // rows that are worked on together: a sum over so many may be one in float32
// Wanted rows whose part of a gradient is summed on its own: what it is must not depend on the number of
// threads.
constexpr int64_t kTask = 1024;
// Elements of rows worth a thread: a megabyte of float32, which one reads in the time that others take to
// wake.
constexpr int64_t kGrain = 1 << 18;

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// In the type of arithmetic.
template <class T>
std::vector<Arithmetic<T> > widened(const Tensor& vector) {
  const T* values = pointer<T>(vector);
  return {values, values + vector.numel()};
}

// Calls f(filter, first, count) for the wanted rows begin.. up to `end`, of all, in pieces of rows of one
// filter that follow one another.
template <class F>
void for_pieces(const HyperSlice& slice, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end;) {
    const int64_t filter = row / slice.run(), first = row % slice.run();
    const int64_t count = std::min({kPiece, slice.run() - first, end - row});
    f(filter, first, count);
    row += count;
  }
}

// Calls f(r, element) for the elements that rows first.. of a filter generate.
template <class F>
void for_elements(const HyperSlice& slice, int64_t filter, int64_t first, int64_t count, const F& f) {
  if (!slice.by_tap) {
    for (int64_t r = 0; r < count; ++r) f(r, filter * slice.run() + first + r);
    return;
  }
  int64_t channel = first / slice.taps, tap = first % slice.taps;
  for (int64_t r = 0; r < count; ++r) {
    f(r, filter * slice.run() + tap * slice.in_channels + channel);
    if (++tap == slice.taps) {
      tap = 0;
      ++channel;
    }
  }
}

template <class T, class Out>
void generate(const HyperSlice& slice, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
              const Tensor& generated) {
  using A = Arithmetic<T>;
  const std::vector<A> x = widened<T>(hidden);
  const T *rows = pointer<T>(weight), *biases = pointer<T>(bias);
  Out* out = mutable_pointer<Out>(generated);
  torch::stable::parallel_for(
      0, slice.wanted_rows(), ceil_div(kGrain, slice.size), [&](int64_t begin, int64_t end) {
        for_pieces(slice, begin, end, [&](int64_t filter, int64_t first, int64_t count) {
          const int64_t row = filter * slice.filter_rows + first;
          std::array<A, kPiece> sums;
          FASTPRUNE_DISPATCH(generate_rows, rows + row * slice.size, biases + row, x.data(), count,
                             slice.size, sums.data());
          for_elements(slice, filter, first, count, [&](int64_t r, int64_t element) {
            out[element] = static_cast<Out>(
                static_cast<std::conditional_t<std::is_same_v<Out, double>, double, float> >(sums[r]));
          });
        });
      });
}

Tensor hyper_weight(Tensor hidden, Tensor weight, Tensor bias, int64_t out_channels, int64_t in_channels,
                    Shape shape, ScalarType dtype, bool channels_last) {
  const HyperSlice slice =
      check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype, channels_last);
  const Tensor generated = empty_generated(slice, weight, shape, dtype, channels_last);
  visit_dtype(weight.scalar_type(), [&](auto type) {
    visit_dtype(dtype, [&](auto out_type) {
      generate<typename decltype(type)::type, typename decltype(out_type)::type>(slice, hidden, weight, bias,
                                                                                 generated);
    });
  });
  return generated;
}

struct Gradients {
  Tensor hidden, weight, bias;
};

// Asks for the memory of a large tensor, which nobody has touched yet, in large pages: the operating system
// hands out fresh memory at the first touch, page by page, and with pages of 4 KB that takes longer than
// writing a gradient of 100 MB.
void ask_for_large_pages([[maybe_unused]] const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kLarge = int64_t{8} << 20;
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes < kLarge) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: it may be refused
#endif
}

// Zeros for the rows of a filter that are not wanted.
template <class T>
void clear_rows(const HyperSlice& slice, int64_t filter, const Gradients& gradients) {
  const int64_t wanted = filter < slice.out_channels ? slice.run() : 0;
  const int64_t first = filter * slice.filter_rows + wanted, count = slice.filter_rows - wanted;
  std::memset(static_cast<void*>(mutable_pointer<T>(gradients.weight) + first * slice.size), 0,
              count * slice.size * sizeof(T));
  std::memset(static_cast<void*>(mutable_pointer<T>(gradients.bias) + first), 0, count * sizeof(T));
}

template <class T, class In>
void differentiate(const HyperSlice& slice, const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                   const Gradients& gradients) {
  using A = Arithmetic<T>;
  const std::vector<A> x = widened<T>(hidden);
  const T* rows = pointer<T>(weight);
  const In* in = pointer<In>(grad);
  T *to_weight = mutable_pointer<T>(gradients.weight), *to_bias = mutable_pointer<T>(gradients.bias);
  const int64_t tasks = ceil_div(slice.wanted_rows(), kTask);
  std::vector<double> sums(tasks * slice.size);
  const auto run = [&](int64_t task) {
    if (task >= tasks) return clear_rows<T>(slice, task - tasks, gradients);
    const int64_t begin = task * kTask, end = std::min(begin + kTask, slice.wanted_rows());
    for_pieces(slice, begin, end, [&](int64_t filter, int64_t first, int64_t count) {
      const int64_t row = filter * slice.filter_rows + first;
      std::array<A, kPiece> grads;
      for_elements(slice, filter, first, count,
                   [&](int64_t r, int64_t element) { grads[r] = static_cast<A>(in[element]); });
      FASTPRUNE_DISPATCH(differentiate_rows, rows + row * slice.size, grads.data(), x.data(), count,
                         slice.size, to_weight + row * slice.size, sums.data() + task * slice.size);
      for (int64_t r = 0; r < count; ++r) to_bias[row + r] = static_cast<T>(grads[r]);
    });
  };
  if (slice.rows() * slice.size <= kGrain)
    for (int64_t task = 0; task < tasks + slice.filters; ++task) run(task);
  else
    for_tasks(tasks + slice.filters, run);
  T* to_hidden = mutable_pointer<T>(gradients.hidden);
  for (int64_t k = 0; k < slice.size; ++k) {
    double total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += sums[task * slice.size + k];
    to_hidden[k] = static_cast<T>(static_cast<A>(total));
  }
}

std::tuple<Tensor, Tensor, Tensor> hyper_weight_backward(Tensor grad, Tensor hidden, Tensor weight,
                                                         Shape shape) {
  const HyperSlice slice = check_hyper_weight_backward(grad, hidden, weight, shape);
  const ScalarType dtype = weight.scalar_type();
  const Gradients gradients{empty_like(hidden, dtype), empty_like(weight, dtype),
                            torch::stable::new_empty(weight, {slice.rows()})};
  ask_for_large_pages(gradients.weight);
  visit_dtype(dtype, [&](auto type) {
    visit_dtype(grad.scalar_type(), [&](auto in_type) {
      differentiate<typename decltype(type)::type, typename decltype(in_type)::type>(slice, grad, hidden,
                                                                                     weight, gradients);
    });
  });
  return {gradients.hidden, gradients.weight, gradients.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("hyper_weight", TORCH_BOX(&hyper_weight));
  library.impl("hyper_weight_backward", TORCH_BOX(&hyper_weight_backward));
}

}  // namespace fastprune

#endif
