// The kinds of decorrelation on CUDA, as launchers/decorrelation.cpp calls them. For every kind:
//
//   <kind>_scratch   the bytes of scratch memory, aligned to 256, that a call wants; 0 for none
//   <kind>_forward   writes the penalty and all coefficients; one launch
//   <kind>_backward  writes all gradients; one launch
//
// Penalty, grad and coefficients are of the accumulator's type: float64 for float64 weights, else float32;
// but a covariance's coefficients are int32, see ../decorrelation.h. Nothing is initialised: neither outputs
// nor scratch.
#pragma once

#include "../decorrelation.h"
#include "plan.h"

namespace fastprune::cuda {

struct Problem {
  Decorrelation call;  // not empty
  Dtype dtype;         // of the weights and gradients
  const bool* mask;    // [N] on the device, or null: every filter takes part
  void* scratch;
};

// Covariance and correlation.
int64_t gram_scratch(const Problem& problem, bool backward);
void gram_forward(const Problem& problem, void* penalty, void* coefficients, Stream stream);
void gram_backward(const Problem& problem, const void* grad, const void* coefficients, Stream stream);

int64_t kernel_covariance_scratch(const Problem& problem, bool backward);
void kernel_covariance_forward(const Problem& problem, void* penalty, Stream stream);
void kernel_covariance_backward(const Problem& problem, const void* grad, Stream stream);

int64_t orthogonality_scratch(const Problem& problem, bool backward);
void orthogonality_forward(const Problem& problem, void* penalty, void* coefficients, Stream stream);
void orthogonality_backward(const Problem& problem, const void* grad, const void* coefficients,
                            Stream stream);

}  // namespace fastprune::cuda
