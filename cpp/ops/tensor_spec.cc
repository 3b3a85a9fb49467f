#include "engine/tensor_spec.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "engine/error.h"

namespace engine {
namespace {

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < std::min(view.rank, kMaxRank); ++i)
    text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + (view.rank > kMaxRank ? ", ...]" : "]");
}

std::string shape_text(std::initializer_list<Extent> shape) {
  std::string text = "[";
  for (const Extent& extent : shape) {
    if (text.size() > 1) text += ", ";
    if (extent.dim == nullptr) {
      text += std::to_string(extent.value);
    } else {
      text += extent.dim->name();
      if (extent.dim->is_bound()) text += "=" + std::to_string(extent.dim->value());
    }
  }
  return text + "]";
}

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": expected " + expected + ", got " + got);
}

const char* device_name(DeviceType type) {
  switch (type) {
    case DeviceType::kCpu: return "cpu";
    case DeviceType::kCuda: return "cuda";
    case DeviceType::kOther: return "another device";
  }
  return "unknown";
}

bool shape_agrees(const TensorView& view, std::initializer_list<Extent> shape) {
  if (view.rank != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (const Extent& extent : shape) {
    const int64_t wanted = extent.dim != nullptr ? extent.dim->value() : extent.value;
    if (wanted >= 0 && view.shape[i] != wanted) return false;
    ++i;
  }
  return true;
}

uintptr_t num_bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    default: return 1;
  }
}

// Extents of one and empty tensors constrain no stride.
bool layout_agrees(const TensorView& view, Layout layout) {
  int64_t step = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] == 0) return true;
    if (layout == Layout::kRows && i == 0) break;
    if (view.shape[i] != 1 && view.strides[i] != step) return false;
    step *= view.shape[i];
  }
  return true;
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt64: return "int64";
    case DType::kInt32: return "int32";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kBool: return "bool";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kFloat64: return "float64";
    case DType::kOther: return "another dtype";
  }
  return "unknown";
}

void expect(const TensorView& view, const char* name, std::initializer_list<DType> dtypes,
            std::initializer_list<Extent> shape, Layout layout, DeviceType device) {
  if (view.device != device) {
    refuse(name, std::string("a tensor on ") + device_name(device), device_name(view.device));
  }
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    std::string expected;
    for (DType dtype : dtypes) expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    refuse(name, expected, dtype_name(view.dtype));
  }
  if (!shape_agrees(view, shape)) refuse(name, shape_text(shape), shape_text(view));
  if (!layout_agrees(view, layout)) {
    const char* expected = layout == Layout::kRows ? "contiguous rows" : "a contiguous tensor";
    std::string got = "strides [";
    for (int i = 0; i < view.rank; ++i) got += (i ? ", " : "") + std::to_string(view.strides[i]);
    refuse(name, expected, got + "] for shape " + shape_text(view));
  }
  if (const uintptr_t size = num_bytes_of(view.dtype); reinterpret_cast<uintptr_t>(view.data) % size != 0) {
    refuse(name, "elements at multiples of " + std::to_string(size) + " bytes", "others");
  }
  int i = 0;
  for (const Extent& extent : shape) {
    if (extent.dim != nullptr) extent.dim->bind(view.shape[i]);
    ++i;
  }
}

}  // namespace engine
