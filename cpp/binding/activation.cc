#include "ops/gated.h"

#include <string>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "engine/error.h"
#include "ops/clamped_swiglu.h"
#include "ops/softcap.h"

namespace engine::binding {

namespace py = pybind11;

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kTanhGelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  if (name == "tanh") return Activation::kTanh;
  throw Error(ErrorCode::kInvalidArgument,
              "activation: expected gelu, gelu_tanh, silu, relu or tanh, got '" + name + "'");
}

void bind_activation(py::module_& module) {
  const auto def_gate = [&](const char* name, auto op) {
    module.def(
        name,
        [op](cpu::ExecutionContext& ctx, const TensorView& gate_up, const TensorView& out) {
          ctx.perform([=, &ctx] { op(ctx, gate_up, out); });
        },
        py::arg("ctx"), py::arg("gate_up"), py::arg("out"), ReleaseGil());
  };
  def_gate("silu_mul", &ops::silu_mul);
  def_gate("gelu_mul", &ops::gelu_mul);
  def_gate("erf_gelu_mul", &ops::erf_gelu_mul);
  module.def(
      "activate",
      [](cpu::ExecutionContext& ctx, const TensorView& x, const std::string& activation,
         const TensorView& out) { ops::activate(ctx, x, activation_of(activation), out); },
      py::arg("ctx"), py::arg("x"), py::arg("activation"), py::arg("out"), ReleaseGil());
  module.def("clamped_swiglu", &ops::clamped_swiglu, py::arg("ctx"), py::arg("gate_up"), py::arg("alpha"),
             py::arg("limit"), py::arg("out"), ReleaseGil());
  module.def("softcap", &ops::softcap, py::arg("ctx"), py::arg("x"), py::arg("cap"), ReleaseGil());
}

}  // namespace engine::binding
