// What every op asks of its inputs; fastprune/ops/checks.py says the same in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
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

using Extents = torch::headeronly::IntHeaderOnlyArrayRef;

// The number of elements of dimensions first.. if they are one dense run in memory in whatever order; else 0.
// They are not empty.
inline int64_t dense_run(Extents sizes, Extents strides, size_t first) {
  size_t runs[64];  // dimensions longer than 1, by stride: what has more of them has 2^64 elements
  size_t count = 0;
  for (size_t d = first; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    size_t place = count++;
    for (; place > 0 && strides[runs[place - 1]] > strides[d]; --place) runs[place] = runs[place - 1];
    runs[place] = d;
  }
  int64_t expected = 1;
  for (size_t i = 0; i < count; ++i) {
    if (strides[runs[i]] != expected) return 0;
    expected *= sizes[runs[i]];
  }
  return expected;
}

// The product of numbers that are at least 1; 0 where it is beyond int64.
inline int64_t product_or_zero(Extents numbers) {
  int64_t product = 1;
  for (int64_t number : numbers) {
    if (number > std::numeric_limits<int64_t>::max() / product) return 0;
    product *= number;
  }
  return product;
}

// Whether each filter is one dense run of K elements (contiguous and channels_last both are).
inline bool is_filter_major(Extents sizes, Extents strides) {
  const int64_t size = dense_run(sizes, strides, 1);
  return size > 0 && (sizes[0] <= 1 || strides[0] == size);
}

// Whether the elements are one dense run in memory, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  return tensor.numel() == 0 || dense_run(tensor.sizes(), tensor.strides(), 0) > 0;
}

// Whether shapes and strides are equal, where a stride matters.
inline bool same_layout(const Tensor& tensor, const Tensor& other) {
  if (tensor.dim() != other.dim()) return false;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != other.size(d) || (tensor.size(d) > 1 && tensor.stride(d) != other.stride(d)))
      return false;
  return true;
}

inline bool same_device(const Tensor& tensor, const Tensor& other) {
  return tensor.device() == other.device();
}

inline void check_dtype_and_device(const char* op, const char* name, const std::vector<Tensor>& tensors) {
  if (tensors.empty()) return;
  const ScalarType expected = tensors[0].scalar_type();
  const auto device = tensors[0].device();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ScalarType dtype = tensors[i].scalar_type();
    if (!is_supported(dtype) || dtype != expected)
      fail(op, ": ", name, " must share one dtype of float32, float64, bfloat16, float16; ", name, "[", i,
           "] has ", dtype_name(dtype));
    if (!(tensors[i].device() == device))
      fail(op, ": ", name, " must be on one device; ", name, "[", i, "] is on another");
  }
}

inline std::vector<Layer> check_weights(const char* op, const std::vector<Tensor>& weights,
                                        const char* name = "weights") {
  check_dtype_and_device(op, name, weights);
  std::vector<Layer> layers;
  layers.reserve(weights.size());
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const Extents sizes = weight.sizes(), strides = weight.strides();
    const int64_t elements = weight.numel();
    if (sizes.size() < 2 || elements == 0)
      fail(op, ": ", name, "[", i, "] must be [filters, ...] with at least one filter and element, got ",
           list(sizes));
    if (!is_filter_major(sizes, strides))
      fail(op, ": ", name, "[", i,
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

// A weight as it lies in memory: [rows, channels, inner], where channels are its input channels. Rows count
// the filters, and the kernel positions that are farther apart than the channels are; `inner` the others: of
// a contiguous weight it is kh·kw, channels_last it is 1.
struct ChannelView {
  const void* data;
  int64_t rows, channels, inner;
  int64_t first;  // index of its first channel among the M of the model
};

inline std::vector<ChannelView> channel_views(const std::vector<Tensor>& params,
                                              const std::vector<Layer>& layers) {
  std::vector<ChannelView> views;
  views.reserve(layers.size());
  int64_t first = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto [data, filters, size, index] = layers[i];
    const int64_t channels = params[i].size(1), inner = channels > 1 ? params[i].stride(1) : size;
    views.push_back({data, filters * size / (channels * inner), channels, inner, first});
    first += channels;
  }
  return views;
}

inline void check_channel_vector(const char* op, const char* name, const Tensor& vector, int64_t m) {
  if (vector.scalar_type() != ScalarType::Float || vector.dim() != 1 || vector.size(0) != m ||
      !vector.is_contiguous())
    fail(op, ": ", name, " must be a contiguous float32 tensor of shape [", m,
         "] (one entry per input channel), got ", dtype_name(vector.scalar_type()), " ",
         list(vector.sizes()));
}

inline void check_masked_weights(const char* op, int64_t filters, const Tensor& mask, ScalarType dtype,
                                 const std::optional<Tensor>& feedback) {
  if (!is_supported(dtype))
    fail(op, ": dtype must be one of float32, float64, bfloat16, float16; got ", dtype_name(dtype));
  check_filter_vector(op, "mask", mask, filters, ScalarType::Bool);
  if (feedback) check_filter_vector(op, "feedback", *feedback, filters, ScalarType::Float);
}

// Dispatch looks at all tensors of a call together, so each may still be elsewhere.
inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  if (!same_device(tensor, like)) fail(op, ": ", name, " must be on the device of the weights");
}

inline void check_scores(const char* op, const Tensor& scores, int64_t k) {
  if (scores.dim() != 1 || scores.scalar_type() != ScalarType::Float || !scores.is_contiguous())
    fail(op, ": scores must be a contiguous float32 vector, got ", dtype_name(scores.scalar_type()), " ",
         list(scores.sizes()));
  if (k < 0 || k >= scores.numel()) fail(op, ": k must be in [0, ", scores.numel(), "), got ", k);
}

inline void check_rate(const char* op, double rate) {
  if (!(rate >= 0 && rate < 1)) fail(op, ": rate must be in [0, 1), got ", rate);
}

inline void check_ord(const char* op, int64_t ord) {
  if (ord != 1 && ord != 2) fail(op, ": ord must be 1 (mean |w|) or 2 (mean w^2), got ", ord);
}

}  // namespace fastprune
