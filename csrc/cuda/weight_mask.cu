// weight_mask: contract in fastprune/ops/weight_mask.py.
//
// Three launches count the importances' digits, most significant first, each within the bin that the one
// before it found; a fourth writes the masks. The importances are computed anew each time, never stored.
#include "launch.cuh"
#include "reduce.cuh"
#include "vector.cuh"
#include "weight_mask.h"

namespace fastprune::cuda {
namespace {

constexpr int32_t kBlocksPerSm = 2;  // 64 registers, 32 warps on every multiprocessor since sm_80

enum Pointer { kA, kB, kMask };

template <class T>
constexpr int32_t kWidth = kVectorBytes / sizeof(T);

// Vectors of each tensor that a thread asks for before it waits.
constexpr int32_t kInFlight = 2;

template <class T>
struct Values {
  Vector<T, kWidth<T>> a, b;
};

template <class T>
__device__ int32_t importance_bits(T a, T b, Formula formula) {
  auto value = widen(a);
  if (formula == Formula::square) value *= value;
  if (formula == Formula::product) value *= widen(b);
  return __float_as_int(fabsf(static_cast<float>(value)));
}

// Calls f(k, bits, count, whole) for the vectors of this thread, from element k of the layer on.
template <class T, class F>
__device__ void for_importances(const Place& place, Formula formula, const F& f) {
  constexpr int32_t kEach = kWidth<T>;
  const Extent extent = extent_of(place, kEach);
  const T* a = input<T>(place.layer, kA) + extent.begin;
  const T* b = input<T>(place.layer, kB);
  if (b) b += extent.begin;
  const auto read = [&](int64_t k, int32_t count, auto kind) {
    Values<T> values{load<kEach>(a + k, count, kind), {}};
    if (b) values.b = load<kEach>(b + k, count, kind);
    return values;
  };
  for_vectors<kEach, kInFlight>(place, extent.size, read,
                                [&](int64_t k, const Values<T>& values, int32_t count, auto kind) {
                                  Vector<int32_t, kEach> bits;
#pragma unroll
                                  for (int32_t i = 0; i < kEach; ++i)
                                    bits.x[i] = importance_bits(values.a.x[i], values.b.x[i], formula);
                                  f(extent.begin + k, bits, count, kind);
                                });
}

struct Pass {
  int32_t index;
  Digit digit;
  uint32_t blocks;  // of all launches
  uint64_t rank;    // of the threshold, in the first pass
};

constexpr int32_t kWords = 1 << 13;

// How often a block met each of a digit's bins. Where they fit, every lane counts in a column of its own,
// which is a bank of shared memory: words of two bins, 16 bits each, enough for the weights of a block. So no
// lane waits for another, whatever the weights are. Of a longer digit each bin is a word: it comes last, when
// few weights are left to be counted, and lanes that meet the same bin are one access.
struct BlockCounts {
  uint32_t* words;     // [kWords], in shared memory
  int32_t bins, lane;  // whole warps of bins
  bool columns;
  static_assert(kRowVectors * kVectorBytes / 2 < 1 << 16, "a block's weights, of 16 bits, fit a count");

  __device__ BlockCounts(uint32_t* in, const Digit& digit)
      : words(in), bins(1 << digit.bits), lane(threadIdx.x % 32), columns(bins * 16 <= kWords) {}

  __device__ void clear() const {
    for (int32_t i = threadIdx.x; i < (columns ? bins * 16 : bins); i += kThreads) words[i] = 0;
  }

  // `InColumns` is `columns`, known to the compiler.
  template <bool InColumns>
  __device__ void add(int32_t bin) const {
    if constexpr (InColumns)
      atomicAdd(&words[(bin >> 1) * 32 + lane], bin & 1 ? 1u << 16 : 1u);
    else
      atomicAdd(&words[bin], 1u);
  }

  // Adds the counts to those of all blocks.
  __device__ void add_to(uint64_t* counts) const {
    auto* totals = reinterpret_cast<unsigned long long*>(counts);
    if (columns) {
      // A thread for each bin; the two of a word share its columns, and each begins at a bank of its own.
      for (int32_t bin = threadIdx.x; bin < bins; bin += kThreads) {
        const int32_t row = bin / 2, half = bin % 2;
        uint32_t both = 0;
        for (int32_t i = 0; i < 16; ++i) both += words[row * 32 + half * 16 + (i + row) % 16];
        both += __shfl_xor_sync(kWholeWarp, both, 1);
        if (const uint32_t count = half ? both >> 16 : both & 0xffffu)
          atomicAdd(&totals[bin], static_cast<unsigned long long>(count));
      }
    } else {
      for (int32_t i = threadIdx.x; i < bins; i += kThreads)
        if (words[i]) atomicAdd(&totals[i], static_cast<unsigned long long>(words[i]));
    }
  }
};

// By one block: the bin that holds the importance of that rank, and its rank there. Counts are read where the
// atomics of all blocks left them.
__device__ void find_bin(const Pass& pass, int32_t prefix, WeightSelection& selection) {
  __shared__ uint64_t sums[kThreads / 32];
  const int32_t each = (1 << pass.digit.bits) / kThreads, first = threadIdx.x * each;
  const uint64_t* counts = selection.counts + pass.digit.first;
  const uint64_t rank = pass.index == 0 ? pass.rank : selection.rank;
  const int32_t lane = threadIdx.x % 32;
  uint64_t sum = 0;
  for (int32_t i = 0; i < each; ++i) sum += counts[first + i];
  uint64_t before = sum;  // up to and with this thread's bins; first those of the warp
  for (int32_t offset = 1; offset < 32; offset *= 2) {
    const uint64_t lower = __shfl_up_sync(kWholeWarp, before, offset);
    if (lane >= offset) before += lower;
  }
  if (lane == 31) sums[threadIdx.x / 32] = before;
  const bool infinite = pass.index == 0 && first >= kInfinityBin && sum > 0;
  const bool keep_all = __syncthreads_or(infinite);
  for (int32_t warp = 0; warp < threadIdx.x / 32; ++warp) before += sums[warp];
  before -= sum;
  if (rank < before || rank >= before + sum) return;  // in another thread's bins
  int32_t bin = first;
  uint64_t left = rank - before;
  for (; left >= counts[bin]; ++bin) left -= counts[bin];
  selection.prefix = keep_all ? -1 : prefix << pass.digit.bits | bin;
  selection.rank = left;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    weight_counts_kernel(const __grid_constant__ Table table, Formula formula, Pass pass,
                         WeightSelection* selection) {
  __shared__ uint32_t words[kWords];
  const int32_t prefix = selection->prefix;
  if (prefix < 0) return;  // there is nothing more to find
  const BlockCounts counts(words, pass.digit);
  counts.clear();
  __syncthreads();
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const auto count_all = [&]<bool InColumns>() {
    for_importances<T>(place, formula, [&](int64_t, const auto& bits, int32_t count, auto) {
#pragma unroll
      for (int32_t i = 0; i < kWidth<T>; ++i) {
        const int32_t digits = bits.x[i] >> pass.digit.shift;
        if (i < count && digits >> pass.digit.bits == prefix)
          counts.add<InColumns>(digits & (counts.bins - 1));
      }
    });
  };
  if (counts.columns)
    count_all.template operator()<true>();
  else
    count_all.template operator()<false>();
  __syncthreads();
  counts.add_to(selection->counts + pass.digit.first);
  if (is_last_block(&selection->tickets[pass.index], pass.blocks)) find_bin(pass, prefix, *selection);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    weight_mask_kernel(const __grid_constant__ Table table, Formula formula,
                       const WeightSelection* selection) {
  const Place place = place_of(table, blockIdx.x, threadIdx.x);
  const int32_t threshold = __ldg(&selection->prefix);  // below 0, all are kept
  bool* mask = output<bool>(place.layer, kMask);
  for_importances<T>(place, formula, [&](int64_t k, const auto& bits, int32_t count, auto kind) {
    Vector<bool, kWidth<T>> kept;
#pragma unroll
    for (int32_t i = 0; i < kWidth<T>; ++i) kept.x[i] = bits.x[i] > threshold;
    store(mask + k, kept, count, kind);
  });
}

template <class T>
void launch_all(const Plan& plan, Formula formula, uint64_t rank, WeightSelection* selection, Stream stream) {
  for (int32_t i = 0; i < kWeightPasses; ++i) {
    const Pass pass{i, kWeightDigits[i], static_cast<uint32_t>(plan.blocks), rank};
    for_launches(plan, [&](const Table& table, const Launch& grid) {
      weight_counts_kernel<T>
          <<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(table, formula, pass, selection);
    });
  }
  for_launches(plan, [&](const Table& table, const Launch& grid) {
    weight_mask_kernel<T>
        <<<static_cast<uint32_t>(grid.blocks), kThreads, 0, stream>>>(table, formula, selection);
  });
}

}  // namespace

void launch_weight_mask(const Plan& plan, Dtype dtype, Formula formula, int64_t rank,
                        WeightSelection* selection, Stream stream) {
  clear(selection, sizeof(*selection), stream);
  visit_dtype(dtype, [&](auto type) {
    launch_all<typename decltype(type)::type>(plan, formula, rank, selection, stream);
  });
}

}  // namespace fastprune::cuda
