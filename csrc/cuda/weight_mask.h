// The launches of weight_mask.cu.
#pragma once

#include "plan.h"

namespace fastprune::cuda {

// An importance is |a|, |a · a| or |a · b|; a and b lie behind the pointers of a layer, and then the mask.
enum class Formula { magnitude, square, product };

// The masks of the importances above that of the given rank.
void launch_weight_mask(const Plan& plan, Dtype dtype, Formula formula, int64_t rank,
                        WeightSelection* selection, Stream stream);

}  // namespace fastprune::cuda
