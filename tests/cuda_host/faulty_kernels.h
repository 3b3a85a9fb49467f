// Kernels with a fault each, which the emulator has to find.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace engine::simt {

inline void skip_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}
inline void skip_shuffle(float* out) {
  if (threadIdx.x != 5) *out = __shfl_xor_sync(cuda::kAllLanes, 1.0f, 1);
}
inline void misalign(float* out) { *out = cuda::load_vec<cuda::Pack<float, 4>>(out + 1).at[0]; }
inline void leave_shared(float*) { cuda::dynamic_shared<float>()[64] = 1.0f; }
// The number is 0 where the copy is taken for done before it is waited for, else NaN.
inline void forget_wait(float* out) {
  float* shared = cuda::dynamic_shared<float>();
  cuda::cp_async(shared, out);
  cuda::commit_copies();
  if (threadIdx.x == 0) out[4] = shared[0];
  cuda::wait_copies<0>();
  if (threadIdx.x == 0) out[5] = shared[0];
}

// Runs one on 64 threads with 256 bytes of shared memory and returns what it left behind: {unwaited, waited}.
inline std::pair<float, float> run_faulty(const std::string& name) {
  void (*kernel)(float*) = name == "skip_barrier"   ? skip_barrier
                           : name == "skip_shuffle" ? skip_shuffle
                           : name == "misalign"     ? misalign
                           : name == "leave_shared" ? leave_shared
                           : name == "forget_wait"  ? forget_wait
                                                    : nullptr;
  if (kernel == nullptr) throw std::invalid_argument(name);
  alignas(16) float memory[8] = {};
  cuda::launch(kernel, dim3(1), dim3(64), 256, nullptr, memory);
  return {memory[4], memory[5]};
}

}  // namespace engine::simt
