// The launches of filter_mask.cu.
#pragma once

#include "plan.h"

namespace fastprune::cuda {

struct Selection {
  bool* mask;        // null: only the norms are wanted
  bool fresh;        // whether the mask holds nothing yet
  uint32_t* ticket;  // of the blocks that are done
  uint32_t blocks;   // of all launches
  int32_t n;
  int32_t k;
};

// The norms of the filters behind each layer's first pointer, and the mask that the selection wants of them.
void launch_filter_mask(const Plan& plan, Dtype dtype, int64_t ord, float* scores, const Selection& selection,
                        Stream stream);

// threshold = sort(scores)[k] of `n`.
void launch_kth_threshold(const float* scores, int64_t n, int64_t k, float* threshold, Stream stream);

}  // namespace fastprune::cuda
