// A borrowed tensor: valid for one call, owns nothing.
#pragma once

#include <cstdint>

namespace engine {

// kFloat64 and kOther are what no op takes: expect() refuses them by the name of the argument.
enum class DType : uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt8,
  kUInt8,
  kBool,
  kFloat8E4M3,
  kFloat64,
  kOther
};

enum class DeviceType : uint8_t { kCpu, kCuda, kOther };

inline constexpr int kMaxRank = 4;

// Strides are in elements, always filled in; of a rank above kMaxRank, which no op takes, only the
// first extents are known. `stream` is the framework's current CUDA stream for
// the tensor's device, null on the CPU.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  DeviceType device = DeviceType::kCpu;
  int device_id = 0;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};
  void* stream = nullptr;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace engine
