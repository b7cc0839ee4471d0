// The launch of masked_weights.cu.
#pragma once

#include "plan.h"

namespace fastprune::cuda {

// Filter f is multiplied by 1 if kept, else by its feedback, or by `pruned` where there is no feedback.
struct Factors {
  const bool* mask;
  const float* feedback;  // or null
  float pruned;
};

// The filters behind each layer's first pointer times their factors, to behind the second.
void launch_masked_weights(const Plan& plan, Dtype in, Dtype out, const Factors& factors, Stream stream);

}  // namespace fastprune::cuda
