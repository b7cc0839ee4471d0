// filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.
#ifdef FASTPRUNE_ISA

#include "filters.inl"

#else

#include <limits>

#include "host.h"

#define FASTPRUNE_FILE "filter_mask.cpp"
#include "for_each_isa.h"

namespace fastprune {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

void score(const char* op, const std::vector<Tensor>& weights, const std::vector<Layer>& layers, int64_t ord,
           float* scores) {
  check_ord(op, ord);
  if (layers.empty()) return;
  visit_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_filters(layers, [&](size_t i, int64_t begin, int64_t end) {
      const Layer& layer = layers[i];
      const T* first = static_cast<const T*>(layer.data) + begin * layer.size;
      FASTPRUNE_DISPATCH(score_filters, first, end - begin, layer.size, ord, scores + layer.first + begin);
    });
  });
  bool finite = true;
  for (int64_t f = 0; f < count_filters(layers); ++f) finite &= std::fabs(scores[f]) <= kLargest;
  if (finite) return;
  for (size_t i = 0; i < layers.size(); ++i) {
    const float* first = scores + layers[i].first;
    if (!std::all_of(first, first + layers[i].filters, [](float x) { return std::isfinite(x); }))
      fail(op, ": weights[", i, "] has a NaN or Inf: its filter norms are not finite");
  }
}

// Bits that order as the floats do: those of negative ones are turned over.
uint32_t ordered_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// sort(scores)[k]: counts by the leading bits say which values can be it, and of those it is selected.
float select(const float* scores, int64_t n, int64_t k) {
  constexpr int kBits = 11;
  std::array<int64_t, 1 << kBits> counts{};
  for (int64_t i = 0; i < n; ++i) ++counts[ordered_bits(scores[i]) >> (32 - kBits)];
  uint32_t bin = 0;
  while (k >= counts[bin]) k -= counts[bin++];
  thread_local std::vector<float> candidates;  // kept for the next call
  candidates.clear();
  for (int64_t i = 0; i < n; ++i)
    if (ordered_bits(scores[i]) >> (32 - kBits) == bin) candidates.push_back(scores[i]);
  std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end());
  return candidates[k];
}

void write_mask(const char* op, const std::vector<Tensor>& weights, const std::vector<Layer>& layers,
                double rate, int64_t ord, bool* mask) {
  thread_local std::vector<float> scores;
  const int64_t n = count_filters(layers);
  scores.resize(n);
  score(op, weights, layers, ord, scores.data());
  if (n == 0) return;
  const float threshold = select(scores.data(), n, static_cast<int64_t>(static_cast<double>(n) * rate));
  for (int64_t f = 0; f < n; ++f) mask[f] = scores[f] > threshold;
}

Tensor filter_norms(std::vector<Tensor> weights, int64_t ord) {
  const auto layers = check_weights("filter_norms", weights);
  Tensor scores = torch::stable::new_empty(weights[0], {count_filters(layers)}, ScalarType::Float);
  score("filter_norms", weights, layers, ord, static_cast<float*>(scores.mutable_data_ptr()));
  return scores;
}

Tensor kth_threshold(Tensor scores, int64_t k) {
  check_scores("kth_threshold", scores, k);
  const int64_t n = scores.numel();
  const float* values = static_cast<const float*>(scores.const_data_ptr());
  if (std::any_of(values, values + n, [](float x) { return std::isnan(x); }))
    fail("kth_threshold: scores have a NaN");
  Tensor threshold = torch::stable::new_empty(scores, {});
  *static_cast<float*>(threshold.mutable_data_ptr()) = select(values, n, k);
  return threshold;
}

Tensor filter_mask(std::vector<Tensor> weights, double rate, int64_t ord) {
  check_rate("filter_mask", rate);
  const auto layers = check_weights("filter_mask", weights);
  Tensor mask = torch::stable::new_empty(weights[0], {count_filters(layers)}, ScalarType::Bool);
  write_mask("filter_mask", weights, layers, rate, ord, static_cast<bool*>(mask.mutable_data_ptr()));
  return mask;
}

void update_filter_masks_(std::vector<Tensor> weights, double rate, int64_t ord, Tensor mask) {
  check_rate("update_filter_masks_", rate);
  const auto layers = check_weights("update_filter_masks_", weights);
  check_filter_vector("update_filter_masks_", "mask", mask, count_filters(layers), ScalarType::Bool);
  write_mask("update_filter_masks_", weights, layers, rate, ord, static_cast<bool*>(mask.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("filter_norms", TORCH_BOX(&filter_norms));
  library.impl("kth_threshold", TORCH_BOX(&kth_threshold));
  library.impl("filter_mask", TORCH_BOX(&filter_mask));
  library.impl("update_filter_masks_", TORCH_BOX(&update_filter_masks_));
}

}  // namespace fastprune

#endif
