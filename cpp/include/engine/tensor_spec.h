// Checks a TensorView against what an op expects, and words the refusal.
//
//   Dim T("T"), H("H");
//   expect(q, "q", {DType::kFloat32}, {T, H, 64}, Layout::kRows);   // binds T and H
//   expect(k, "k", {DType::kFloat32}, {T, G, 64}, Layout::kRows);   // T must agree
//
// A mismatch throws, for example: "k: expected [T=3, G, 64], got [4, 2, 64]".
#pragma once

#include <initializer_list>

#include "engine/tensor_view.h"

namespace engine {

// A named extent, bound by the first tensor that uses it.
class Dim {
 public:
  explicit Dim(const char* name) : name_(name) {}
  Dim(const char* name, int64_t value) : name_(name), value_(value) {}

  const char* name() const { return name_; }
  bool is_bound() const { return value_ >= 0; }
  int64_t value() const { return value_; }
  void bind(int64_t value) { value_ = value; }
  operator int64_t() const { return value_; }

 private:
  const char* name_;
  int64_t value_ = -1;
};

// Either a Dim or a fixed number.
struct Extent {
  Extent(Dim& named) : dim(&named) {}      // NOLINT: implicit on purpose
  Extent(int64_t fixed) : value(fixed) {}  // NOLINT
  Extent(int fixed) : value(fixed) {}      // NOLINT

  Dim* dim = nullptr;
  int64_t value = -1;
};

enum class Layout {
  kContiguous,  // row-major without gaps
  kRows,        // the first dimension may have any stride, the others are without gaps
};

void expect(const TensorView& view, const char* name, std::initializer_list<DType> dtypes,
            std::initializer_list<Extent> shape, Layout layout = Layout::kContiguous,
            DeviceType device = DeviceType::kCpu);

const char* dtype_name(DType dtype);

}  // namespace engine
