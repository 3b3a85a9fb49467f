// What the threads of a block find out together. `shared` is memory of the block that nothing else uses
// meanwhile; every thread of the block takes part, and every thread gets the result.
#pragma once

#include "simt.h"

namespace engine::cuda {

// (CUDA's atomics know no other 64-bit integer.)
using Wide = unsigned long long;

constexpr int kMaxWarps = 32;

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int num_threads() { return static_cast<int>(blockDim.x); }

// `join` is applied in an order that depends on the number of threads alone.
template <typename T, typename Join>
__device__ T reduce_block(T value, T* shared, Join join) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2)
    value = join(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();  // of the last call's results
  if (thread_index() % kWarpLanes == 0) shared[thread_index() / kWarpLanes] = value;
  __syncthreads();
  T joined = shared[0];
  for (int warp = 1; warp < num_threads() / kWarpLanes; ++warp) joined = join(joined, shared[warp]);
  return joined;
}

template <typename T>
__device__ T sum_of_block(T value, T* shared) {
  return reduce_block(value, shared, [](T a, T b) { return a + b; });
}
template <typename T>
__device__ T max_of_block(T value, T* shared) {
  return reduce_block(value, shared, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
__device__ T min_of_block(T value, T* shared) {
  return reduce_block(value, shared, [](T a, T b) { return a < b ? a : b; });
}

// Where a running sum reaches a target.
struct Reached {
  int index;    // -1: nowhere
  Wide before;  // the sum of what comes before
};

struct ReachShared {
  Wide sums[kMaxWarps];
  Reached reached;
};

// The first i of [0, count) at which value_of(0) + ... + value_of(i) is at least `target`, which is not 0. A
// thread asks for the values of neighbours, once or twice.
template <typename Values>
__device__ Reached find_reached(int count, Wide target, ReachShared& shared, Values value_of) {
  const int per_thread = (count + num_threads() - 1) / num_threads();
  const int begin = min(count, thread_index() * per_thread), end = min(count, begin + per_thread);
  Wide own = 0;
  for (int i = begin; i < end; ++i) own += value_of(i);
  const int lane = thread_index() % kWarpLanes, warp = thread_index() / kWarpLanes;
  Wide up_to_here = own;
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const Wide left = __shfl_up_sync(kAllLanes, up_to_here, step);
    if (lane >= step) up_to_here += left;
  }
  __syncthreads();  // of the last call's results
  if (lane == kWarpLanes - 1) shared.sums[warp] = up_to_here;
  if (thread_index() == 0) shared.reached = {-1, 0};
  __syncthreads();
  for (int other = 0; other < warp; ++other) up_to_here += shared.sums[other];
  Wide running = up_to_here - own;
  if (running < target && up_to_here >= target) {
    for (int i = begin; i < end; ++i) {
      const Wide value = value_of(i);
      if (running + value >= target) {
        shared.reached = {i, running};
        break;
      }
      running += value;
    }
  }
  __syncthreads();
  return shared.reached;
}

// What other blocks wrote during this kernel: past the first cache, which may hold what was there before.
template <typename T>
__device__ T fresh(const T* at) {
  return *static_cast<const volatile T*>(at);
}

// Whether this block is the last of `count` to come here, counted in `counter`, which starts at 0. What the
// others wrote before is then there to be read by fresh().
__device__ inline bool is_last_block(unsigned* counter, unsigned count, bool* shared) {
  __threadfence();
  __syncthreads();
  if (thread_index() == 0) *shared = atomicAdd(counter, 1u) + 1 == count;
  __syncthreads();
  __threadfence();
  return *shared;
}

}  // namespace engine::cuda
