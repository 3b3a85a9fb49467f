// What kernels are written with: CUDA's own names under nvcc, and under a C++ compiler with
// -DENGINE_SIMT_HOST the same names from tests/cuda_host, which runs whole kernels on the CPU.
// Kernels (cuda/kernels/*.cuh) include this file and each other, nothing else. Rules that both sides share:
//
// - Shared memory is dynamic: dynamic_shared<T>(). The emulator fills it with bytes of 0xff (NaN) for every
// block.
// - Memory is read and written 16 bytes at a time with load_vec and store_vec, whose alignment the emulator
// checks.
// - Copies by cp_async are there after wait_copies<n>() and then sync_warp or __syncthreads, not before: the
//   emulator moves the bytes at the wait.
// - Warp collectives name the lanes that take part (kAllLanes where all do); lanes that left the kernel never
// do.
// - Arithmetic types are float and integers. BFloat16, Float16 and Float8 are stored bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace engine::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// e4m3fn: no infinities, NaN is 0x7f and 0xff, the largest number is 448.
struct Float8 {
  uint8_t bits;
};

// N elements that move in one instruction where they fill 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpLanes = 32;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNotANumber = __builtin_nanf("");

}  // namespace engine::cuda

#ifdef ENGINE_SIMT_HOST
#include "simt_host.h"
#else
#include "simt_device.h"
#endif

namespace engine::cuda {

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return to_bfloat16(x);
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return to_float16(x);
}

__device__ inline float to_float(float x) { return x; }

// The sum or maximum over groups of `width` neighbouring lanes (a power of two), in every lane of the group.
__device__ inline float reduce_add(float x, int width = kWarpLanes) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ inline float reduce_max(float x, int width = kWarpLanes) {
  for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

}  // namespace engine::cuda
