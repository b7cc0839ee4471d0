// What the launchers share: dtypes to CUDA's types, the stream, and the layers as the plan wants them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "../tensor.h"
#include "plan.h"

namespace fastprune::cuda {

using torch::stable::accelerator::DeviceGuard;

// A type as a value, to be passed to generic lambdas.
template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with CUDA's type of a checked dtype.
template <class F>
void visit_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<__nv_bfloat16>{});
    case ScalarType::Half:
      return f(Type<__half>{});
    default:
      fail("expected float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls f(table, launch) for every grid of the plan.
template <class F>
void for_launches(const Plan& plan, const F& f) {
  for (const Launch& launch : plan.launches) {
    f(make_table(plan, launch), launch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace fastprune::cuda
