// A borrowed tensor: valid for one call, owns nothing.
#pragma once

#include <cstdint>

namespace engine {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kInt8, kUInt8, kBool };

enum class DeviceType : uint8_t { kCpu, kCuda };

inline constexpr int kMaxRank = 4;

// Strides are in elements, always filled in. `stream` is the framework's current CUDA stream for
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
