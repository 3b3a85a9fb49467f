// The host's side of cuda/simt.h: CUDA's names, run on the CPU. A fiber stands for each thread of a block, and
// runs until it has to wait for others; blocks run one after the other. Faults are exceptions out of the
// launch: a misaligned vector, threads that wait for each other, writing past the dynamic shared memory.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace engine::simt {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kExchangeBytes = 64;

// What a thread sees of itself.
struct Place {
  uint3 thread;
  uint3 block;
  dim3 block_dim, grid_dim;
};
const Place& place();

// Ends the launch with an error.
[[noreturn]] void fault(const char* what);

// Waits for the lanes of `mask`, each of which gives `num_bytes`; returns all that was given, lane l's at
// l * kExchangeBytes. Valid until the warp's next exchange with that mask.
const unsigned char* exchange(unsigned mask, const void* value, size_t num_bytes);
void sync_block();
unsigned char* shared_memory();
int lane_index();

void start_copy(void* shared, const void* global, bool is_wanted);
void commit_copies();
void wait_copies(int num_pending);

// Counts 16-byte rows of one matrix that lie in the same banks of shared memory.
void note_matrix_rows(const unsigned char* addresses);

template <typename T>
T of_lane(const unsigned char* given, int lane) {
  T value;
  std::memcpy(&value, given + lane * kExchangeBytes, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= kExchangeBytes);
  const unsigned char* given = exchange(mask, &value, sizeof(T));
  if (!(mask >> from & 1)) fault("a shuffle reads a lane that takes no part");
  return of_lane<T>(given, from);
}

// What a test can ask about the launches so far.
struct Counters {
  int64_t blocks = 0;
  int64_t matrix_rows = 0;       // rows that ldmatrix read
  int64_t matrix_conflicts = 0;  // of those that waited for another row's banks
};
Counters& counters();

// Whether the threads of a block run from the last to the first: what lacks a barrier differs.
void run_backwards(bool is_backwards);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace engine::simt

#define threadIdx (::engine::simt::place().thread)
#define blockIdx (::engine::simt::place().block)
#define blockDim (::engine::simt::place().block_dim)
#define gridDim (::engine::simt::place().grid_dim)

inline void __syncthreads() { engine::simt::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { engine::simt::exchange(mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = engine::simt::lane_index();
  return engine::simt::shuffle(mask, value, lane / width * width + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int lane = engine::simt::lane_index(), from = lane ^ other;
  return engine::simt::shuffle(mask, value, from / width == lane / width ? from : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = engine::simt::lane_index(), from = lane - static_cast<int>(delta);
  return engine::simt::shuffle(mask, value, from < lane / width * width ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = engine::simt::lane_index(), from = lane + static_cast<int>(delta);
  return engine::simt::shuffle(mask, value, from >= (lane / width + 1) * width ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int is_set) {
  const unsigned char* given = engine::simt::exchange(mask, &is_set, sizeof(is_set));
  unsigned set = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && engine::simt::of_lane<int>(given, lane)) set |= 1u << lane;
  }
  return set;
}
inline int __any_sync(unsigned mask, int is_set) { return __ballot_sync(mask, is_set) != 0; }
inline int __all_sync(unsigned mask, int is_set) { return __ballot_sync(mask, is_set) == mask; }
inline unsigned __activemask() { return 0xffffffffu; }
template <typename T>
T reduce_lanes(unsigned mask, T value, T (*join)(T, T)) {
  const unsigned char* given = engine::simt::exchange(mask, &value, sizeof(T));
  bool is_first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T next = engine::simt::of_lane<T>(given, lane);
    result = is_first ? next : join(result, next);
    is_first = false;
  }
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return reduce_lanes<unsigned>(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return reduce_lanes<T>(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return reduce_lanes<T>(mask, value, [](T a, T b) { return a < b ? a : b; });
}

// Fibers run one at a time: nothing comes between.
template <typename T>
T atomicExch(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
template <typename T>
T atomicAdd(T* at, T value) {
  return atomicExch(at, static_cast<T>(*at + value));
}
template <typename T>
T atomicMax(T* at, T value) {
  return atomicExch(at, *at > value ? *at : value);
}
template <typename T>
T atomicMin(T* at, T value) {
  return atomicExch(at, *at < value ? *at : value);
}
template <typename T>
T atomicOr(T* at, T value) {
  return atomicExch(at, static_cast<T>(*at | value));
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  return atomicExch(at, *at == expected ? value : *at);
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}

template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a > b ? a : b;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return out;
}

#include "simt_host_formats.h"
#include "simt_host_matrices.h"

namespace engine::cuda {

template <typename T>
T load_vec(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0)
    simt::fault("a vector is read from a misaligned address");
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
void store_vec(void* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(T) != 0)
    simt::fault("a vector is written to a misaligned address");
  std::memcpy(to, &value, sizeof(T));
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::shared_memory());
}

inline float load_written(const float* at) { return *at; }

inline void sync_warp() { __syncwarp(); }
inline void cp_async(void* shared, const void* global, bool is_wanted = true) {
  simt::start_copy(shared, global, is_wanted);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kPending>
void wait_copies() {
  simt::wait_copies(kPending);
}

}  // namespace engine::cuda
