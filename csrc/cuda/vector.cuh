// Where a thread works, and how it reads, converts and writes: the four dtypes, one or several elements at
// once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace fastprune::cuda {

// The filter a thread works on, and which of its threads it is.
struct Place {
  const TableLayer& layer;
  int32_t row;  // index within the layer; past its end in the last block's spare threads
  int32_t lane;
  int32_t lanes;
};

template <int32_t Capacity>
__device__ Place place_of(const Table<Capacity>& table, int32_t block, int32_t thread) {
  int32_t low = 0, high = table.count - 1;  // the last layer that begins at or before the block
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (table.layers[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const TableLayer& layer = table.layers[low];
  const int32_t row = (block - layer.first_block) * (kThreads >> layer.shift) + (thread >> layer.shift);
  return {layer, row, thread & ((1 << layer.shift) - 1), 1 << layer.shift};
}

template <class T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T x[Width];
};

// An unsigned type of so many bytes: what the memory instructions move.
template <int Bytes>
using Word = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

// One access; `from` is aligned to the vector. What a kernel writes itself must not be read so.
template <int Width, class T>
__device__ Vector<T, Width> load(const T* from) {
  const auto word = __ldg(reinterpret_cast<const Word<sizeof(T) * Width>*>(from));
  Vector<T, Width> vector;
  memcpy(&vector, &word, sizeof(vector));
  return vector;
}

template <class T, int Width>
__device__ void store(T* to, const Vector<T, Width>& vector) {
  Word<sizeof(vector)> word;
  memcpy(&word, &vector, sizeof(vector));
  // Spelled out, since the compiler may split an assignment into stores of single elements.
  __stcg(reinterpret_cast<Word<sizeof(vector)>*>(to), word);
}

// To the type of arithmetic: float64 for float64, else float32.
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// Rounded to nearest even; float64 goes to 16 bits through float32, as in PyTorch.
template <class Out, class A>
__device__ Out narrow(A x) {
  if constexpr (std::is_same_v<Out, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<Out, __half>)
    return __float2half_rn(static_cast<float>(x));
  else
    return static_cast<Out>(x);
}

}  // namespace fastprune::cuda
