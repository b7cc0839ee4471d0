// What the launchers share: tensors to what the launches take, the stream and the device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../../tensor.h"
#include "../plan.h"

namespace fastprune::cuda {

using torch::stable::accelerator::DeviceGuard;

// Of a checked dtype.
inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      fail("expected float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

}  // namespace fastprune::cuda
