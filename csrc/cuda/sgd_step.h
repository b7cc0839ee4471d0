// The launch of sgd_step.cu.
#pragma once

#include "plan.h"

namespace fastprune::cuda {

struct SgdStep {
  double momentum, dampening, weight_decay;
  bool nesterov, first, maximize;
  Dtype lr_dtype;  // float32 or float64
  const void* lr;
  const float* grad_scale;    // or null
  const float* found_inf;     // or null
  const float* filter_decay;  // or null
};

struct StepOutputs {
  const bool* mask;  // null: no masked weights are wanted
  float* norms;      // or null
  int32_t ord;
};

// Behind the pointers of a layer lie param, gradient, momentum and masked weight; the last two may be null.
// `masked` is the dtype of the masked weights, where any are wanted.
void launch_sgd_step(const Plan& plan, Dtype dtype, Dtype masked, const SgdStep& step,
                     const StepOutputs& outputs, Stream stream);

}  // namespace fastprune::cuda
