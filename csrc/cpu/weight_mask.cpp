// weight_mask: contract in fastprune/ops/weight_mask.py.
//
// The threshold is the k-th smallest of up to tens of millions of importances. They are never stored:
// non-negative floats order as their bits do, so three counting passes over 11, 11 and 10 bits find it
// exactly, and a fourth writes the masks.
#ifdef FASTPRUNE_ISA

#include "simd.inl"

namespace fastprune::FASTPRUNE_ISA {

// bits[i] = the importance of weight i, a non-negative float32, as its bits.
template <class T>
void importance_bits(const T* weight, const T* grad, int64_t n, Importance importance, uint32_t* bits) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = std::fabs(static_cast<float>(f(i)));
      std::memcpy(bits + i, &value, sizeof value);
    }
  };
  switch (importance) {
    case Importance::l1:
      return each([&](int64_t i) { return static_cast<A>(weight[i]); });
    case Importance::l2:
      return each([&](int64_t i) { return static_cast<A>(weight[i]) * static_cast<A>(weight[i]); });
    case Importance::grad:
      return each([&](int64_t i) { return static_cast<A>(grad[i]); });
    case Importance::taylor:
      return each([&](int64_t i) { return static_cast<A>(weight[i]) * static_cast<A>(grad[i]); });
  }
}

// Positive floats compare as their bits: which of them are above the threshold's.
template <class Bits>
void above(const Bits* bits, int64_t n, uint32_t threshold, bool* mask) {
  for (int64_t i = 0; i < n; ++i) mask[i] = bits[i] > threshold;
}

}  // namespace fastprune::FASTPRUNE_ISA

#else

#include <array>

#include "../weight_mask.h"
#include "host.h"

#define FASTPRUNE_FILE "weight_mask.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

constexpr int64_t kChunk = 4096;            // importances held at a time
constexpr int64_t kGrain = 16;              // chunks worth a thread
constexpr uint32_t kInfinity = 0x7f800000;  // bits at and above are Inf or NaN

struct Chunk {
  size_t layer;
  int64_t begin, size;
};

// Calls f(chunk, bits) for every chunk of all layers, on several threads.
template <class F>
void for_chunks(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, Importance importance,
                const std::vector<Chunk>& chunks, int64_t begin, int64_t end, const F& f) {
  visit_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    std::array<uint32_t, kChunk> bits;
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      const T* weight = static_cast<const T*>(weights[chunk.layer].const_data_ptr()) + chunk.begin;
      const T* grad =
          grads.empty() ? nullptr : static_cast<const T*>(grads[chunk.layer].const_data_ptr()) + chunk.begin;
      FASTPRUNE_DISPATCH(importance_bits, weight, grad, chunk.size, importance, bits.data());
      f(chunk, bits.data());
    }
  });
}

std::vector<Tensor> weight_mask(std::vector<Tensor> weights, double rate, std::string name,
                                std::vector<Tensor> grads) {
  const Importance importance = check_weight_mask(weights, rate, name, grads).importance;

  std::vector<Tensor> masks;
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    masks.push_back(empty_like(weights[i], ScalarType::Bool));
    const int64_t n = weights[i].numel();
    for (int64_t begin = 0; begin < n; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, n - begin)});
    total += n;
  }
  const int64_t count = static_cast<int64_t>(chunks.size());

  int64_t rank = static_cast<int64_t>(static_cast<double>(total) * rate);
  uint32_t prefix = 0;
  for (const auto& [shift, width] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
    const uint32_t bins = 1u << width;
    std::vector<std::atomic<int64_t> > histogram(bins);
    torch::stable::parallel_for(
        0, count, kGrain, [&, shift = shift, width = width](int64_t begin, int64_t end) {
          std::vector<int64_t> local(bins);
          for_chunks(weights, grads, importance, chunks, begin, end,
                     [&](const Chunk& chunk, const uint32_t* bits) {
                       for (int64_t i = 0; i < chunk.size; ++i)
                         if (static_cast<uint64_t>(bits[i]) >> (shift + width) == prefix)
                           ++local[(bits[i] >> shift) & (bins - 1)];
                     });
          // Counts of integers: the order of the additions does not matter.
          for (uint32_t b = 0; b < bins; ++b) histogram[b] += local[b];
        });
    if (shift == 21)
      for (uint32_t b = kInfinity >> shift; b < bins; ++b)
        if (histogram[b] > 0) {
          // Some values in the bin of Inf may be finite; look closely, and name the layer.
          for_chunks(weights, grads, importance, chunks, 0, count,
                     [&](const Chunk& chunk, const uint32_t* bits) {
                       if (std::any_of(bits, bits + chunk.size, [](uint32_t x) { return x >= kInfinity; }))
                         fail("weight_mask: weights[", chunk.layer,
                              "] has a NaN or Inf: its importances are not finite");
                     });
          break;
        }
    uint32_t bin = 0;
    while (rank >= histogram[bin]) rank -= histogram[bin++];
    prefix = (prefix << width) | bin;
  }

  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for_chunks(weights, grads, importance, chunks, begin, end, [&](const Chunk& chunk, const uint32_t* bits) {
      bool* mask = static_cast<bool*>(masks[chunk.layer].mutable_data_ptr()) + chunk.begin;
      FASTPRUNE_DISPATCH(above, bits, chunk.size, prefix, mask);
    });
  });
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) { library.impl("weight_mask", TORCH_BOX(&weight_mask)); }

}  // namespace fastprune

#endif
