#include "ops/linear.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "engine/error.h"

namespace engine::binding {
namespace {

namespace py = pybind11;
using cpu::ExecutionContext;
using cpu::PackedMatrix;

constexpr const char* kFormatNames[] = {"float32", "bfloat16", "bf16_dot", "int8", "int4", "int4_affine"};

WeightFormat format_of(const std::string& dtype) {
  for (int i = 0; i < 6; ++i) {
    if (dtype == kFormatNames[i]) return static_cast<WeightFormat>(i);
  }
  throw Error(ErrorCode::kInvalidArgument,
              "dtype: expected float32, bfloat16, bf16_dot, int8, int4 or int4_affine, got '" + dtype + "'");
}

// Views of a list's tensors, valid as long as this lives.
class TensorList {
 public:
  explicit TensorList(const py::list& tensors) {
    for (const py::handle& tensor : tensors) {
      if (!view_of(tensor.ptr(), views_.emplace_back(), holds_.emplace_back())) {
        throw py::type_error("parts: expected a list of tensors");
      }
    }
  }

  const std::vector<TensorView>& views() const { return views_; }

 private:
  std::vector<TensorView> views_;
  std::vector<CapsuleHold> holds_;
};

}  // namespace

void bind_linear(py::module_& module) {
  py::class_<PackedMatrix>(module, "PackedMatrix")
      .def(py::init([](int64_t out_features, int64_t in_features, const std::string& dtype, int64_t group_len) {
             return std::make_unique<PackedMatrix>(out_features, in_features, format_of(dtype), group_len);
           }),
           py::arg("out_features"), py::arg("in_features"), py::arg("dtype"), py::arg("group_len") = 0)
      .def(
          "balance_columns",
          [](PackedMatrix& self, ExecutionContext& ctx, const py::list& parts) {
            const TensorList tensors(parts);
            const py::gil_scoped_release release;
            self.balance_columns(ctx.pool(), tensors.views());
          },
          py::arg("ctx"), py::arg("parts"))
      .def(
          "pack_rows",
          [](PackedMatrix& self, ExecutionContext& ctx, int64_t row_start, const TensorView& weight) {
            self.pack_rows(ctx.pool(), row_start, weight);
          },
          py::arg("ctx"), py::arg("row_start"), py::arg("weight"), ReleaseGil())
      .def(
          "pack_codes",
          [](PackedMatrix& self, ExecutionContext& ctx, int64_t row_start, const TensorView& codes,
             const TensorView& scales, const std::optional<TensorView>& offsets) {
            self.pack_codes(ctx.pool(), row_start, codes, scales, offsets ? &*offsets : nullptr);
          },
          py::arg("ctx"), py::arg("row_start"), py::arg("codes"), py::arg("scales"),
          py::arg("offsets") = py::none(), ReleaseGil())
      .def(
          "write_file",
          [](const PackedMatrix& self, ExecutionContext& ctx, int fd, int64_t offset) {
            return self.write_file(ctx.pool(), fd, offset);
          },
          py::arg("ctx"), py::arg("fd"), py::arg("offset"), ReleaseGil())
      .def(
          "read_file",
          [](PackedMatrix& self, ExecutionContext& ctx, int fd, int64_t offset) {
            return self.read_file(ctx.pool(), fd, offset);
          },
          py::arg("ctx"), py::arg("fd"), py::arg("offset"), ReleaseGil())
      .def("map_file", &PackedMatrix::map_file, py::arg("fd"), py::arg("offset"), ReleaseGil())
      .def("clear", &PackedMatrix::clear)
      .def_property("column_scales", &PackedMatrix::stored_column_scales, &PackedMatrix::set_column_scales)
      .def_property("column_order", &PackedMatrix::stored_column_order, &PackedMatrix::set_column_order)
      .def_property_readonly("out_features", &PackedMatrix::out_features)
      .def_property_readonly("in_features", &PackedMatrix::in_features)
      .def_property_readonly(
          "dtype", [](const PackedMatrix& self) { return kFormatNames[static_cast<int>(self.format())]; })
      .def_property_readonly("group_len", [](const PackedMatrix& self) { return self.layout().group_len; })
      .def_property_readonly("num_bytes", &PackedMatrix::num_bytes)
      .def_property_readonly("is_complete", &PackedMatrix::is_complete);

  module.def(
      "linear",
      [](ExecutionContext& ctx, const TensorView& x, const PackedMatrix& weight,
         const std::optional<TensorView>& bias, const TensorView& out) {
        ctx.perform([=, &ctx, &weight] { ops::linear(ctx, x, weight, bias ? &*bias : nullptr, out); });
      },
      py::arg("ctx"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), ReleaseGil());
  module.def(
      "gated_linear",
      [](ExecutionContext& ctx, const TensorView& x, const PackedMatrix& weight,
         const std::optional<TensorView>& bias, const std::string& activation, const TensorView& out) {
        ctx.perform([=, &ctx, &weight, kind = activation_of(activation)] {
          ops::gated_linear(ctx, x, weight, bias ? &*bias : nullptr, kind, out);
        });
      },
      py::arg("ctx"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("out"),
      ReleaseGil());
  module.def(
      "gated_mlp",
      [](ExecutionContext& ctx, const TensorView& x, const PackedMatrix& gate_up,
         const std::optional<TensorView>& gate_up_bias, const std::string& activation,
         const TensorView& product, const PackedMatrix& down, const std::optional<TensorView>& down_bias,
         const TensorView& out) {
        ctx.perform([=, &ctx, &gate_up, &down, kind = activation_of(activation)] {
          ops::gated_mlp(ctx, x, gate_up, gate_up_bias ? &*gate_up_bias : nullptr, kind, product, down,
                         down_bias ? &*down_bias : nullptr, out);
        });
      },
      py::arg("ctx"), py::arg("x"), py::arg("gate_up"), py::arg("gate_up_bias"), py::arg("activation"),
      py::arg("product"), py::arg("down"), py::arg("down_bias"), py::arg("out"), ReleaseGil());
  module.def(
      "embedding",
      [](ExecutionContext& ctx, const TensorView& token_ids, const PackedMatrix& weight,
         const TensorView& out) {
        ctx.perform([=, &ctx, &weight] { ops::embedding(ctx, token_ids, weight, out); });
      },
      py::arg("ctx"), py::arg("token_ids"), py::arg("weight"), py::arg("out"), ReleaseGil());
}

}  // namespace engine::binding
