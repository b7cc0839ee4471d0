// What every op asks of its inputs; fastprune/ops/checks.py says the same in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// One layer's weight: `filters` runs of `size` elements each, dense in memory, in whatever order within a
// run.
struct Layer {
  const void* data;
  int64_t filters;  // F
  int64_t size;     // K = C·kh·kw
  int64_t first;    // index of its first filter among the N of the model
};

// Whether each filter is one dense run of K elements (contiguous and channels_last both are).
inline bool is_filter_major(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides) {
  std::array<std::pair<int64_t, int64_t>, 8> runs;  // stride, size; by stride
  size_t count = 0;
  for (size_t d = 1; d < sizes.size(); ++d) {
    if (sizes[d] <= 1) continue;
    if (count == runs.size()) return false;
    size_t place = count++;
    for (; place > 0 && runs[place - 1].first > strides[d]; --place) runs[place] = runs[place - 1];
    runs[place] = {strides[d], sizes[d]};
  }
  int64_t expected = 1;
  for (size_t i = 0; i < count; ++i) {
    if (runs[i].first != expected) return false;
    expected *= runs[i].second;
  }
  return sizes[0] <= 1 || strides[0] == expected;
}

inline std::vector<Layer> check_weights(const char* op, const std::vector<Tensor>& weights) {
  std::vector<Layer> layers;
  layers.reserve(weights.size());
  int64_t first = 0;
  if (weights.empty()) return layers;
  const ScalarType expected = weights[0].scalar_type();
  const auto device = weights[0].device();
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const ScalarType dtype = weight.scalar_type();
    const auto sizes = weight.sizes(), strides = weight.strides();
    const int64_t elements = weight.numel();
    if (!is_supported(dtype) || dtype != expected)
      fail(op, ": weights must share one dtype of float32, float64, bfloat16, float16; weights[", i, "] has ",
           dtype_name(dtype));
    if (!(weight.device() == device))
      fail(op, ": weights must be on one device; weights[", i, "] is on another");
    if (sizes.size() < 2 || elements == 0)
      fail(op, ": weights[", i, "] must be [filters, ...] with at least one filter and element, got ",
           list(sizes));
    if (!is_filter_major(sizes, strides))
      fail(op, ": weights[", i,
           "] must be contiguous or channels_last (each filter one dense run), got strides ", list(strides));
    const int64_t filters = sizes[0];
    layers.push_back({weight.const_data_ptr(), filters, elements / filters, first});
    first += filters;
  }
  return layers;
}

inline int64_t count_filters(const std::vector<Layer>& layers) {
  return layers.empty() ? 0 : layers.back().first + layers.back().filters;
}

inline void check_filter_vector(const char* op, const char* name, const Tensor& vector, int64_t n,
                                ScalarType dtype) {
  if (vector.scalar_type() != dtype || vector.dim() != 1 || vector.size(0) != n || !vector.is_contiguous())
    fail(op, ": ", name, " must be a contiguous ", dtype_name(dtype), " tensor of shape [", n,
         "] (one entry per filter), got ", dtype_name(vector.scalar_type()), " ", list(vector.sizes()));
}

inline void check_rate(const char* op, double rate) {
  if (!(rate >= 0 && rate < 1)) fail(op, ": rate must be in [0, 1), got ", rate);
}

inline void check_ord(const char* op, int64_t ord) {
  if (ord != 1 && ord != 2) fail(op, ": ord must be 1 (mean |w|) or 2 (mean w^2), got ", ord);
}

}  // namespace fastprune
