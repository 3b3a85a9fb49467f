// Units of neighbouring elements of a row, as float.
#pragma once

#include "simt.h"

namespace engine::cuda {

// Elements that fill 16 bytes.
template <typename T>
constexpr int kVectorOf = 16 / sizeof(T);

template <int kVector, typename T>
__device__ inline void read_unit(const T* from, float (&x)[kVector]) {
  const auto pack = load_vec<Pack<T, kVector>>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(pack.at[i]);
}

template <int kVector, typename T>
__device__ inline void write_unit(T* to, const float (&x)[kVector]) {
  Pack<T, kVector> pack;
#pragma unroll
  for (int i = 0; i < kVector; ++i) pack.at[i] = from_float<T>(x[i]);
  store_vec(to, pack);
}

}  // namespace engine::cuda
