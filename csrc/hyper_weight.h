// The arguments of hyper_weight and its backward, checked and laid out; what every implementation begins
// with.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "check.h"

namespace fastprune {

// Which rows of a layer generate the wanted weights, and where these lie. A filter's rows that are wanted are
// its first ones: a run of in_channels · taps, then come those of the channels that are not wanted.
struct HyperSlice {
  int64_t size;         // H
  int64_t filters;      // O
  int64_t filter_rows;  // I·kh·kw
  int64_t taps;         // kh·kw
  int64_t out_channels, in_channels;
  bool by_tap;  // the weights lie [out][kh][kw][in] (channels_last), not in the order of the rows

  int64_t run() const { return in_channels * taps; }
  int64_t wanted_rows() const { return out_channels * run(); }
  int64_t rows() const { return filters * filter_rows; }
};

namespace hyper {

// `bias` is null where there is none. Returns a slice of everything.
inline HyperSlice check_layer(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor* bias,
                              const std::vector<int64_t>& shape) {
  std::vector<Tensor> tensors{hidden, weight};
  if (bias) tensors.push_back(*bias);
  check_dtype_and_device(op, bias ? "(hidden, weight, bias)" : "(hidden, weight)", tensors);
  bool positive = shape.size() == 4;
  for (int64_t size : shape) positive = positive && size >= 1;
  if (!positive)
    fail(op, ": shape must be [O, I, kh, kw], each at least 1, got ", list({shape.data(), shape.size()}));
  const int64_t rows = product_or_zero({shape.data(), shape.size()});
  if (rows == 0) fail(op, ": O·I·kh·kw must be below 2^63, got shape = ", list({shape.data(), shape.size()}));
  const HyperSlice whole{
      hidden.numel(), shape[0], shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[0],
      shape[1],       false};
  if (hidden.dim() != 1 || hidden.numel() == 0 || !hidden.is_contiguous())
    fail(op, ": hidden must be a contiguous [H] with H at least 1, got ", list(hidden.sizes()));
  if (weight.dim() != 2 || weight.size(0) != rows || weight.size(1) != whole.size || !weight.is_contiguous())
    fail(op, ": weight must be a contiguous [O·I·kh·kw, H] = [", rows, ", ", whole.size, "], got ",
         list(weight.sizes()));
  if (bias && (bias->dim() != 1 || bias->size(0) != rows || !bias->is_contiguous()))
    fail(op, ": bias must be a contiguous [O·I·kh·kw] = [", rows, "], got ", list(bias->sizes()));
  return whole;
}

// Tensors of four dimensions that are not empty.
inline bool is_channels_last(const Tensor& tensor) {
  const int64_t channels = tensor.size(1), width = tensor.size(3), height = tensor.size(2);
  const int64_t expected[] = {channels * width * height, 1, channels * width, channels};
  for (int64_t d = 0; d < 4; ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) != expected[d]) return false;
  return true;
}

}  // namespace hyper

inline HyperSlice check_hyper_weight(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                     int64_t out_channels, int64_t in_channels,
                                     const std::vector<int64_t>& shape, ScalarType dtype,
                                     bool channels_last) {
  constexpr const char* kOp = "hyper_weight";
  HyperSlice slice = hyper::check_layer(kOp, hidden, weight, &bias, shape);
  if (out_channels < 1 || out_channels > shape[0])
    fail(kOp, ": out_channels must be in [1, O] = [1, ", shape[0], "], got ", out_channels);
  if (in_channels < 1 || in_channels > shape[1])
    fail(kOp, ": in_channels must be in [1, I] = [1, ", shape[1], "], got ", in_channels);
  if (!is_supported(dtype))
    fail(kOp, ": dtype must be one of float32, float64, bfloat16, float16; got ", dtype_name(dtype));
  slice.out_channels = out_channels;
  slice.in_channels = in_channels;
  // Of one channel or one tap, both formats are the order of the rows.
  slice.by_tap = channels_last && in_channels > 1 && slice.taps > 1;
  return slice;
}

inline HyperSlice check_hyper_weight_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                              const std::vector<int64_t>& shape) {
  constexpr const char* kOp = "hyper_weight_backward";
  HyperSlice slice = hyper::check_layer(kOp, hidden, weight, nullptr, shape);
  check_dtype_and_device(kOp, "(grad)", {grad});
  if (!same_device(grad, weight)) fail(kOp, ": grad must be on the device of weight");
  if (grad.dim() != 4 || grad.size(2) != shape[2] || grad.size(3) != shape[3] || grad.numel() == 0 ||
      grad.size(0) > shape[0] || grad.size(1) > shape[1])
    fail(kOp, ": grad must be [out, in, kh, kw] within shape = ", list({shape.data(), shape.size()}),
         ", not empty, got ", list(grad.sizes()));
  const bool contiguous = grad.is_contiguous();
  if (!contiguous && !hyper::is_channels_last(grad))
    fail(kOp, ": grad must be contiguous or channels_last, got strides ", list(grad.strides()));
  slice.out_channels = grad.size(0);
  slice.in_channels = grad.size(1);
  slice.by_tap = !contiguous;
  return slice;
}

// The uninitialised tensor that is generated.
inline Tensor empty_generated(const HyperSlice& slice, const Tensor& weight,
                              const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const std::vector<int64_t> sizes{slice.out_channels, slice.in_channels, shape[2], shape[3]};
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, weight.device(),
                              std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace fastprune
