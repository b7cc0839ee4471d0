// What the launches share: dtypes to CUDA's types, the grids of a plan, and what CUDA says of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "plan.h"

namespace fastprune::cuda {

// A type as a value, to be passed to generic lambdas.
template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with CUDA's type of a dtype.
template <class F>
void visit_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(Type<float>{});
    case Dtype::float64:
      return f(Type<double>{});
    case Dtype::bfloat16:
      return f(Type<__nv_bfloat16>{});
    case Dtype::float16:
      return f(Type<__half>{});
  }
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastprune: CUDA error: ") + cudaGetErrorString(error));
}

// Whether the launch before this could be made; what the kernel does is not waited for.
inline void check_launch() { check(cudaGetLastError()); }

inline void clear(void* memory, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream));
}

// Of the current device.
inline int32_t count_multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Calls f(table, launch) for every grid of the plan.
template <class F>
void for_launches(const Plan& plan, const F& f) {
  for (const Launch& launch : plan.launches) {
    f(make_table(plan, launch), launch);
    check_launch();
  }
}

}  // namespace fastprune::cuda
