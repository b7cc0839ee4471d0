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

__device__ inline Place place_of(const Table& table, int32_t block, int32_t thread) {
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

// The elements of a row among those of its layer; none for spare threads. `width` is that of the plan.
struct Extent {
  int64_t begin, size;
};

__device__ inline Extent extent_of(const Place& place, int32_t width) {
  const TableLayer& layer = place.layer;
  if (place.row >= layer.rows) return {0, 0};
  if (layer.first >= 0) return {place.row * layer.size, layer.size};
  const int64_t row_size = kRowVectors * width, begin = place.row * row_size;
  return {begin, min(row_size, layer.size - begin)};
}

// What lies behind a layer's pointers.
template <class T>
__device__ const T* input(const TableLayer& layer, int32_t i) {
  return static_cast<const T*>(layer.pointers[i]);
}

template <class T>
__device__ T* output(const TableLayer& layer, int32_t i) {
  return static_cast<T*>(const_cast<void*>(layer.pointers[i]));
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

// Whether the kernel only reads a tensor, or writes it too: then it must not be read by way of the read-only
// cache.
enum class Access { kRead, kWritten };

template <Access From, class T>
__device__ T load_one(const T* from) {
  if constexpr (From == Access::kRead)
    return __ldg(from);
  else
    return *from;
}

// One access; `from` is aligned to the vector.
template <int Width, Access From = Access::kRead, class T>
__device__ Vector<T, Width> load(const T* from) {
  const auto word = load_one<From>(reinterpret_cast<const Word<sizeof(T) * Width>*>(from));
  Vector<T, Width> vector;
  memcpy(&vector, &word, sizeof(vector));
  return vector;
}

// How many of a vector's elements there are, of as many as are left.
template <int Width>
__device__ int32_t up_to(int64_t left) {
  return left < Width ? static_cast<int32_t>(left) : Width;
}

// Whether a vector is whole and aligned, or its first `count` elements are to be moved one by one.
using Whole = std::true_type;
using Elements = std::false_type;

template <int Width, Access From = Access::kRead, class T>
__device__ Vector<T, Width> load(const T* from, int32_t, Whole) {
  return load<Width, From>(from);
}

// The elements that are not there are zeros.
template <int Width, Access From = Access::kRead, class T>
__device__ Vector<T, Width> load(const T* from, int32_t count, Elements) {
  Vector<T, Width> vector{};
#pragma unroll
  for (int32_t i = 0; i < Width; ++i)
    if (i < count) vector.x[i] = load_one<From>(from + i);
  return vector;
}

// One access for every 16 bytes of the vector.
template <class T, int Width>
__device__ void store(T* to, const Vector<T, Width>& vector) {
  constexpr int32_t kAccesses = sizeof(vector) > kVectorBytes ? sizeof(vector) / kVectorBytes : 1;
  using Part = Word<sizeof(vector) / kAccesses>;
  Part parts[kAccesses];
  memcpy(parts, &vector, sizeof(vector));
  // Spelled out, since the compiler may split an assignment into stores of single elements.
#pragma unroll
  for (int32_t i = 0; i < kAccesses; ++i) __stcg(reinterpret_cast<Part*>(to) + i, parts[i]);
}

template <class T, int Width>
__device__ void store(T* to, const Vector<T, Width>& vector, int32_t, Whole) {
  store(to, vector);
}

template <class T, int Width>
__device__ void store(T* to, const Vector<T, Width>& vector, int32_t count, Elements) {
#pragma unroll
  for (int32_t i = 0; i < Width; ++i)
    if (i < count) to[i] = vector.x[i];
}

// Calls use(k, values, count, whole) with values = read(k, count, whole) for the vectors of a row of `size`
// elements that this thread has: where they are whole, `InFlight` of them are read before the first is used.
template <int Width, int InFlight, class Read, class Use>
__device__ void for_vectors(const Place& place, int64_t size, const Read& read, const Use& use) {
  const int64_t stride = int64_t{place.lanes} * Width;
  const int64_t last = place.layer.aligned ? size - Width : -1;  // where a whole vector may begin
  int64_t k = place.lane * Width;
  for (; k + (InFlight - 1) * stride <= last; k += InFlight * stride) {
    decltype(read(k, Width, Whole{})) values[InFlight];
#pragma unroll
    for (int32_t j = 0; j < InFlight; ++j) values[j] = read(k + j * stride, Width, Whole{});
#pragma unroll
    for (int32_t j = 0; j < InFlight; ++j) use(k + j * stride, values[j], Width, Whole{});
  }
  for (; k <= last; k += stride) {
    auto values = read(k, Width, Whole{});
    use(k, values, Width, Whole{});
  }
  for (; k < size; k += stride) {
    const int32_t count = up_to<Width>(size - k);
    auto values = read(k, count, Elements{});
    use(k, values, count, Elements{});
  }
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
