// The covariance of the rows of one kernel slice [kh, kw]: by one thread from shared memory, and by a block
// from global memory where the slice is too large for that.
#pragma once

#include "decorrelation_kernel_covariance_run.cuh"

namespace fastprune::cuda::kernel_covariance {

// The slope of |x|, on the diagonal twice: it is in both of its rows.
template <class A>
__device__ A slope(A covariance, bool diagonal) {
  const A size = diagonal ? 2 : 1;
  return covariance > 0 ? size : covariance < 0 ? -size : A(0);
}

// A slice whose size the compiler knows, in registers.
template <int32_t Rows, int32_t Columns, class A>
struct FixedSlice {
  A x[Rows][Columns];  // less the means of the rows

  __device__ explicit FixedSlice(const A* slice) {
#pragma unroll
    for (int32_t i = 0; i < Rows; ++i) {
      A mean = 0;
#pragma unroll
      for (int32_t k = 0; k < Columns; ++k) mean += x[i][k] = slice[i * Columns + k];
      mean /= Columns;
#pragma unroll
      for (int32_t k = 0; k < Columns; ++k) x[i][k] -= mean;
    }
  }

  __device__ A product(int32_t i, int32_t j) const {
    A sum = 0;
#pragma unroll
    for (int32_t k = 0; k < Columns; ++k) sum += x[i][k] * x[j][k];
    return sum;
  }

  __device__ A penalty(bool diagonal) const {
    A sum = 0;
#pragma unroll
    for (int32_t i = 0; i < Rows; ++i)
#pragma unroll
      for (int32_t j = i; j < Rows; ++j)
        if (i != j || diagonal) sum += fabs(product(i, j));
    return sum;
  }

  __device__ void gradient(A* out, bool diagonal, A scale) const {
#pragma unroll
    for (int32_t i = 0; i < Rows; ++i) {
      A sums[Columns] = {};
#pragma unroll
      for (int32_t j = 0; j < Rows; ++j) {
        if (i == j && !diagonal) continue;
        const A sign = slope(product(i, j), i == j);
#pragma unroll
        for (int32_t k = 0; k < Columns; ++k) sums[k] += sign * x[j][k];
      }
#pragma unroll
      for (int32_t k = 0; k < Columns; ++k) out[i * Columns + k] = scale * sums[k];
    }
  }
};

// A slice of any size, in shared memory; it is changed there.
template <class A>
struct AnySlice {
  A* x;
  int32_t kh;
  int32_t kw;

  __device__ AnySlice(A* slice, int32_t kh, int32_t kw) : x(slice), kh(kh), kw(kw) {
    for (int32_t i = 0; i < kh; ++i) {
      A mean = 0;
      for (int32_t k = 0; k < kw; ++k) mean += x[i * kw + k];
      mean /= static_cast<A>(kw);
      for (int32_t k = 0; k < kw; ++k) x[i * kw + k] -= mean;
    }
  }

  __device__ A product(int32_t i, int32_t j) const {
    A sum = 0;
    for (int32_t k = 0; k < kw; ++k) sum += x[i * kw + k] * x[j * kw + k];
    return sum;
  }

  __device__ A penalty(bool diagonal) const {
    A sum = 0;
    for (int32_t i = 0; i < kh; ++i)
      for (int32_t j = diagonal ? i : i + 1; j < kh; ++j) sum += fabs(product(i, j));
    return sum;
  }

  // A few columns at a time stay in registers; for rows longer than that, products are formed again.
  __device__ void gradient(A* out, bool diagonal, A scale) const {
    constexpr int32_t kColumns = 8;
    for (int32_t i = 0; i < kh; ++i)
      for (int32_t first = 0; first < kw; first += kColumns) {
        A sums[kColumns] = {};
        for (int32_t j = 0; j < kh; ++j) {
          if (i == j && !diagonal) continue;
          const A sign = slope(product(i, j), i == j);
#pragma unroll
          for (int32_t k = 0; k < kColumns; ++k)
            if (first + k < kw) sums[k] += sign * x[j * kw + first + k];
        }
#pragma unroll
        for (int32_t k = 0; k < kColumns; ++k)
          if (first + k < kw) out[i * kw + first + k] = scale * sums[k];
      }
  }
};

// A slice in global memory, by all threads of the block. Means are formed again wherever they are wanted:
// this is for correctness; kernels of thousands of elements are not what convolutions have.
template <class T>
struct HugeSlice {
  using A = Accumulator<T>;
  const T* from;
  Layer layer;

  __device__ int64_t place(int32_t i, int32_t k) const {
    return static_cast<int64_t>(i) * layer.strides[1] + static_cast<int64_t>(k) * layer.strides[2];
  }
  __device__ A at(int32_t i, int32_t k) const { return widen(__ldg(from + place(i, k))); }

  __device__ A mean(int32_t i) const {
    A sum = 0;
#pragma unroll 1
    for (int32_t k = 0; k < layer.kw; ++k) sum += at(i, k);
    return sum / static_cast<A>(layer.kw);
  }

  __device__ A product(int32_t i, int32_t j) const {
    const A left = mean(i), right = mean(j);
    A sum = 0;
#pragma unroll 1
    for (int32_t k = 0; k < layer.kw; ++k) sum += (at(i, k) - left) * (at(j, k) - right);
    return sum;
  }

  // This thread's part of it.
  __device__ double penalty(bool diagonal) const {
    double sum = 0;
    for (int64_t pair = threadIdx.x; pair < static_cast<int64_t>(layer.kh) * layer.kh; pair += kThreads) {
      const int32_t i = static_cast<int32_t>(pair / layer.kh), j = static_cast<int32_t>(pair % layer.kh);
      if (i < j || (i == j && diagonal)) sum += fabs(product(i, j));
    }
    return sum;
  }

  __device__ void gradient(T* out, bool kept, bool diagonal, A scale) const {
    for (int64_t e = threadIdx.x; e < static_cast<int64_t>(layer.kh) * layer.kw; e += kThreads) {
      const int32_t i = static_cast<int32_t>(e / layer.kw), k = static_cast<int32_t>(e % layer.kw);
      A sum = 0;
#pragma unroll 1
      for (int32_t j = 0; kept && j < layer.kh; ++j)
        if (i != j || diagonal) sum += slope(product(i, j), i == j) * (at(j, k) - mean(j));
      out[place(i, k)] = narrow<T>(kept ? scale * sum : A(0));
    }
  }
};

}  // namespace fastprune::cuda::kernel_covariance
