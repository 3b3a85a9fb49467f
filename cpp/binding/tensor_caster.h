// pybind11 caster from any DLPack tensor to a borrowed TensorView.
//
// The fast way is the C exchange table that a tensor type publishes once (about 0.1 us a tensor);
// types without it go through their __dlpack__ capsule. Nothing links against torch.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>

#include "engine/tensor_view.h"

struct DLManagedTensorVersioned;
struct DLManagedTensor;

namespace engine::binding {

// Keeps a capsule's tensor alive while its view is in use: for the duration of the call.
class CapsuleHold {
 public:
  CapsuleHold() = default;
  ~CapsuleHold() { reset(); }
  CapsuleHold(CapsuleHold&& other) noexcept
      : versioned_(std::exchange(other.versioned_, nullptr)), legacy_(std::exchange(other.legacy_, nullptr)) {}
  CapsuleHold& operator=(CapsuleHold&& other) noexcept {
    reset();
    versioned_ = std::exchange(other.versioned_, nullptr);
    legacy_ = std::exchange(other.legacy_, nullptr);
    return *this;
  }

  void hold(DLManagedTensorVersioned* tensor) { versioned_ = tensor; }
  void hold(DLManagedTensor* tensor) { legacy_ = tensor; }
  void reset();

 private:
  DLManagedTensorVersioned* versioned_ = nullptr;
  DLManagedTensor* legacy_ = nullptr;
};

// Fills `view` from `object`. False when `object` is no tensor at all; throws Error for a capsule that
// is read-only or no DLPack. What ops cannot take otherwise, expect() refuses, which knows the argument.
bool view_of(PyObject* object, TensorView& view, CapsuleHold& hold);

}  // namespace engine::binding

namespace pybind11::detail {

// The caster of an argument lives as long as the call, and with it what it holds.
template <>
struct type_caster<engine::TensorView> {
  PYBIND11_TYPE_CASTER(engine::TensorView, const_name("Tensor"));

  bool load(handle source, bool /*convert*/) { return engine::binding::view_of(source.ptr(), value, hold_); }

 private:
  engine::binding::CapsuleHold hold_;
};

// Not pybind11's own: that drops the caster of the value, and with it the hold, before the call.
template <>
struct type_caster<std::optional<engine::TensorView>> {
  PYBIND11_TYPE_CASTER(std::optional<engine::TensorView>, const_name("Tensor | None"));

  bool load(handle source, bool /*convert*/) {
    return source.is_none() || engine::binding::view_of(source.ptr(), value.emplace(), hold_);
  }

 private:
  engine::binding::CapsuleHold hold_;
};

}  // namespace pybind11::detail
