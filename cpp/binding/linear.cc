#include "ops/linear.h"

#include <string>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "engine/error.h"

namespace engine::binding {
namespace {

namespace py = pybind11;
using cpu::ExecutionContext;
using cpu::PackedMatrix;

WeightFormat format_of(const std::string& dtype) {
  if (dtype == "bfloat16") return WeightFormat::kBFloat16;
  if (dtype == "float32") return WeightFormat::kFloat32;
  throw Error(ErrorCode::kInvalidArgument, "dtype: expected bfloat16 or float32, got '" + dtype + "'");
}

}  // namespace

void bind_linear(py::module_& module) {
  py::class_<PackedMatrix>(module, "PackedMatrix")
      .def(py::init([](int64_t out_features, int64_t in_features, const std::string& dtype) {
             return std::make_unique<PackedMatrix>(out_features, in_features, format_of(dtype));
           }),
           py::arg("out_features"), py::arg("in_features"), py::arg("dtype"))
      .def(
          "pack_rows",
          [](PackedMatrix& self, ExecutionContext& ctx, int64_t row_start, const TensorView& weight) {
            self.pack_rows(ctx.pool(), row_start, weight);
          },
          py::arg("ctx"), py::arg("row_start"), py::arg("weight"), ReleaseGil())
      .def_property_readonly("out_features", &PackedMatrix::out_features)
      .def_property_readonly("in_features", &PackedMatrix::in_features)
      .def_property_readonly("dtype",
                             [](const PackedMatrix& self) {
                               return self.format() == WeightFormat::kBFloat16 ? "bfloat16" : "float32";
                             })
      .def_property_readonly("num_bytes", &PackedMatrix::num_bytes)
      .def_property_readonly("is_complete", &PackedMatrix::is_complete);

  module.def(
      "linear",
      [](ExecutionContext& ctx, const TensorView& x, const PackedMatrix& weight,
         const std::optional<TensorView>& bias,
         const TensorView& out) { ops::linear(ctx, x, weight, bias ? &*bias : nullptr, out); },
      py::arg("ctx"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), ReleaseGil());
  module.def("embedding", &ops::embedding, py::arg("ctx"), py::arg("token_ids"), py::arg("weight"),
             py::arg("out"), ReleaseGil());
}

}  // namespace engine::binding
