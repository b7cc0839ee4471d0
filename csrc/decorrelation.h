// The arguments of decorrelation and its backward, laid out; decorrelation_check.h makes it of tensors.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune {

enum class Kind { covariance, kernel_covariance, correlation, orthogonality };
enum class Precision { highest, high, medium };

// Below this share of its norm, a centred filter is constant up to rounding; as in
// fastprune/ops/reference/decorrelation.py.
inline constexpr double kConstantFilter = 1e-6;

// A covariance's coefficients are two bits each, the lowest first, and every row of a layer's matrix is whole
// words: 0, 1, 2 (on the diagonal) and 3 for -1.
inline constexpr int64_t kEntriesPerWord = 16;

inline constexpr int64_t words_per_row(int64_t filters) {
  return (filters + kEntriesPerWord - 1) / kEntriesPerWord;
}

struct DecorrelationLayer {
  const void* data;      // [F, K] in the order of memory
  void* gradient;        // backward only; same layout as data
  int64_t filters;       // F
  int64_t size;          // K
  int64_t first;         // index of the first filter among the N of the model
  int64_t coefficients;  // index of the layer's first among those of the model
  int64_t sizes[3];      // C, kh, kw of weights with 4 dimensions, else K, 1, 1
  int64_t strides[3];    // of the same
};

struct Decorrelation {
  Kind kind;
  bool diagonal;
  Precision precision;
  std::vector<DecorrelationLayer> layers;
  int64_t coefficients;  // how many there are
};

}  // namespace fastprune
