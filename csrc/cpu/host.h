// What the ops' host halves share: dtypes to types, and how work is split among threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../check.h"
#include "../tensor.h"
#include "isa.h"

namespace fastprune {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// A type as a value, to be passed to generic lambdas.
template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the C++ type of a checked dtype.
template <class F>
auto visit_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      fail("expected float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i, begin, end) for ranges of the filters of layers[i], balanced over threads by elements: each
// filter once.
template <class F>
void for_filters(const std::vector<Layer>& layers, const F& f) {
  constexpr int64_t kGrain = 1 << 15;  // elements worth a thread
  int64_t total = 0;
  for (const Layer& layer : layers) total += layer.filters * layer.size;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (size_t i = 0; i < layers.size() && offset < end; ++i) {
      const auto [data, filters, size, index] = layers[i];
      // A filter belongs to the thread in whose range it starts.
      const int64_t first = ceil_div(std::max<int64_t>(begin - offset, 0), size);
      const int64_t last = std::min(ceil_div(end - offset, size), filters);
      if (first < last) f(i, first, last);
      offset += filters * size;
    }
  });
}

// Calls f(task) for every task, handed out to threads as they become free: for tasks of unequal cost.
template <class F>
void for_tasks(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // A range may cover several indices where fewer threads answer; each then drains the queue, and the rest
    // find it empty.
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

}  // namespace fastprune
