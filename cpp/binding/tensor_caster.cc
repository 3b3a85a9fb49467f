#include "binding/tensor_caster.h"

#include <dlpack/dlpack.h>

#include <algorithm>
#include <string>

#include "engine/error.h"

namespace engine::binding {
namespace {

namespace py = pybind11;

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, "tensor: " + what);
}

DType dtype_of(const DLDataType& type) {
  if (type.lanes == 1) {
    switch (type.code) {
      case kDLFloat:
        if (type.bits == 64) return DType::kFloat64;
        if (type.bits == 32) return DType::kFloat32;
        if (type.bits == 16) return DType::kFloat16;
        break;
      case kDLBfloat:
        if (type.bits == 16) return DType::kBFloat16;
        break;
      case kDLInt:
        if (type.bits == 64) return DType::kInt64;
        if (type.bits == 32) return DType::kInt32;
        if (type.bits == 8) return DType::kInt8;
        break;
      case kDLUInt:
        if (type.bits == 8) return DType::kUInt8;
        break;
      case kDLBool:
        if (type.bits == 8) return DType::kBool;
        break;
      case kDLFloat8_e4m3fn:
        if (type.bits == 8) return DType::kFloat8E4M3;
        break;
      default: break;
    }
  }
  return DType::kOther;
}

void fill(TensorView& view, const DLTensor& tensor) {
  switch (tensor.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: view.device = DeviceType::kCpu; break;
    case kDLCUDA:
    case kDLCUDAManaged: view.device = DeviceType::kCuda; break;
    default: view.device = DeviceType::kOther; break;
  }
  view.dtype = dtype_of(tensor.dtype);
  view.device_id = tensor.device.device_id;
  view.rank = tensor.ndim;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (tensor.ndim > kMaxRank) {
    std::copy_n(tensor.shape, kMaxRank, view.shape);
    return;
  }
  int64_t step = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : step;
    if (tensor.strides == nullptr) step *= tensor.shape[i];
  }
}

// Exchange tables by type. Types are kept alive, so that an address is never taken by another.
// Small on purpose: a process meets one or two tensor types. Guarded by the GIL.
class ExchangeTables {
 public:
  const DLPackExchangeAPI* find(PyTypeObject* type) {
    for (int i = 0; i < count_; ++i) {
      if (entries_[i].type == type) return entries_[i].table;
    }
    return add(type);
  }

 private:
  struct Entry {
    PyTypeObject* type;
    const DLPackExchangeAPI* table;  // null: the type has none
  };

  const DLPackExchangeAPI* add(PyTypeObject* type) {
    const DLPackExchangeAPI* table = read(type);
    if (count_ < kCapacity) {
      Py_INCREF(type);
      entries_[count_++] = {type, table};
    }
    return table;
  }

  static const DLPackExchangeAPI* read(PyTypeObject* type) {
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (table == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    return table->header.version.major == DLPACK_MAJOR_VERSION ? table : nullptr;
  }

  static constexpr int kCapacity = 16;
  Entry entries_[kCapacity];
  int count_ = 0;
};

ExchangeTables& exchange_tables() {
  static ExchangeTables tables;
  return tables;
}

void view_of_capsule(PyObject* object, TensorView& view, CapsuleHold& hold) {
  py::object capsule;
  const py::handle tensor(object);
  try {
    capsule = tensor.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = tensor.attr("__dlpack__")();  // producers from before version 1
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    hold.hold(managed);
    if (managed->version.major != DLPACK_MAJOR_VERSION) refuse("unsupported DLPack version");
    if (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) refuse("read-only array");
    fill(view, managed->dl_tensor);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    hold.hold(managed);
    fill(view, managed->dl_tensor);
  } else {
    refuse("__dlpack__ returned something else than a DLPack capsule");
  }
}

}  // namespace

void CapsuleHold::reset() {
  if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  if (legacy_ != nullptr && legacy_->deleter != nullptr) legacy_->deleter(legacy_);
  versioned_ = nullptr;
  legacy_ = nullptr;
}

bool view_of(PyObject* object, TensorView& view, CapsuleHold& hold) {
  const DLPackExchangeAPI* table = exchange_tables().find(Py_TYPE(object));
  if (table == nullptr) {
    if (!PyObject_HasAttrString(object, "__dlpack__")) return false;
    view_of_capsule(object, view, hold);
    return true;
  }
  DLTensor tensor;
  if (table->dltensor_from_py_object_no_sync(object, &tensor) != 0) throw py::error_already_set();
  fill(view, tensor);
  if (view.device == DeviceType::kCuda &&
      table->current_work_stream(tensor.device.device_type, tensor.device.device_id, &view.stream) != 0) {
    throw py::error_already_set();
  }
  return true;
}

}  // namespace engine::binding
