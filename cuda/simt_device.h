// The device's side of simt.h: conversions, and instructions that CUDA has no function for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace engine::cuda {

__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline BFloat16 to_bfloat16(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
__device__ inline Float16 to_float16(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
// Numbers beyond 448 become 448.
__device__ inline Float8 to_float8(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }

// Two numbers as 16-bit ones, `low` in the low half.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ inline uint32_t pack_pair<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Products of two pairs of bfloat16; the pairs lie in 32 bits each.
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product;
  // a * b - 0: what sm_80 has.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

template <typename T>
__device__ inline T load_vec(const void* from) {
  return *static_cast<const T*>(from);
}
template <typename T>
__device__ inline void store_vec(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char engine_shared_bytes[];
  return reinterpret_cast<T*>(engine_shared_bytes);
}

// What another block wrote: past this processor's own cache.
__device__ inline float load_written(const float* at) { return __ldcg(at); }

__device__ inline void sync_warp() { __syncwarp(); }

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes into shared memory past the registers and the first cache; where `is_wanted` is
// false zeros are written and nothing is read.
__device__ inline void cp_async(void* shared, const void* global, bool is_wanted = true) {
  const int num_bytes = is_wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(num_bytes)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `kPending` groups of this thread are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 name the rows (16 bytes) of matrix i. Lane l gets
// of each matrix elements 2 (l % 4) and the next of row l / 4; transposed, those rows of column l / 4.
__device__ inline void load_matrices(const void* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(const void* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// The transpose of an 8x8 matrix of 16-bit elements, held as load_matrices gives it.
__device__ inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// c += a b for a [16, 16] and b [16, 8] of T, c [16, 8] float32. Lane l, with row = l / 4 and pair = 2 (l % 4),
// holds a: (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8), each with the element right of
// it; b: (pair, row), (pair + 8, row), each with the element below; c: (row, pair), (row, pair + 1), (row + 8,
// pair), ...
template <typename T>
__device__ inline void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_tiles<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_tiles<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace engine::cuda
