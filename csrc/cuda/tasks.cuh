// Tasks that the blocks of a grid draw from one counter, some of which need what earlier ones wrote.
//
// A block that waits holds a later task than those it waits for. These were drawn before, by blocks that run,
// and the first unfinished task of all waits for none: it ends, however few blocks run at once, and in
// whatever order.
#pragma once

#include <cstdint>

#include "reduce.cuh"

namespace fastprune::cuda {

// The index of a task, in all threads of the block; each is drawn once. `counter` was 0 before the launch.
__device__ inline uint32_t draw_task(uint32_t* counter) {
  __shared__ uint32_t task;
  __syncthreads();  // all have read the one before
  if (threadIdx.x == 0) task = atomicAdd(counter, 1u);
  __syncthreads();
  return task;
}

// What the block wrote is seen by the blocks that wait for this value. `progress` was 0 before the launch.
__device__ inline void publish(uint32_t* progress, uint32_t value) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *const_cast<volatile uint32_t*>(progress) = value;
}

// Returns in all threads once that value, or a larger one, has been published. What was written before it may
// then be read, but not by instructions for constant memory (__ldg).
__device__ inline void wait_for(const uint32_t* progress, uint32_t value) {
  if (threadIdx.x == 0)
    while (*const_cast<const volatile uint32_t*>(progress) < value) __nanosleep(100);
  __syncthreads();
  __threadfence();
}

}  // namespace fastprune::cuda
