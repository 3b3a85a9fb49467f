// Checks that the ops of the CUDA backend share.
#pragma once

#include <cstdint>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"
#include "kernel_args.h"
#include "ops.h"

namespace engine::cuda {

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

inline Format format_of(DType dtype) {
  return dtype == DType::kBFloat16  ? Format::kBFloat16
         : dtype == DType::kFloat16 ? Format::kFloat16
                                    : Format::kFloat32;
}

inline int64_t num_bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kInt64: return 8;
    default: return 1;
  }
}

// Kernels read and write 16 bytes at a time: the first element and every row must lie at multiples of that.
inline void expect_vectors(const TensorView& view, const char* name) {
  const int64_t row_bytes = view.strides[0] * num_bytes_of(view.dtype);
  const bool has_rows = view.shape[0] > 1;
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || (has_rows && row_bytes % 16 != 0)) {
    refuse(std::string(name) + ": expected rows at multiples of 16 bytes, got others");
  }
}

}  // namespace engine::cuda
