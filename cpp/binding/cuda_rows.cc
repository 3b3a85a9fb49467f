#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops_rows.h"

namespace engine::binding {

namespace py = pybind11;

namespace {

using View = const TensorView&;

void define_gate(py::module_& module, const char* name, cuda::Gate gate) {
  module.def(
      name, [gate](View gate_up, View out) { cuda::gated(gate, gate_up, out); }, py::arg("gate_up"),
      py::arg("out"));
}

}  // namespace

void bind_cuda_rows(py::module_& module) {
  module.def(
      "rms_norm", [](View x, View weight, float eps, View out) { cuda::rms_norm(x, weight, eps, out); },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
  module.def("add_rms_norm", &cuda::add_rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"),
             py::arg("eps"), py::arg("out"));
  define_gate(module, "silu_mul", cuda::Gate::kSilu);
  define_gate(module, "gelu_mul", cuda::Gate::kTanhGelu);
  define_gate(module, "erf_gelu_mul", cuda::Gate::kErfGelu);
  module.def(
      "clamped_swiglu",
      [](View gate_up, float alpha, float limit, View out) {
        cuda::gated(cuda::Gate::kClampedSwiglu, gate_up, out, alpha, limit);
      },
      py::arg("gate_up"), py::arg("alpha"), py::arg("limit"), py::arg("out"));
  module.def("softcap", [](View x, float cap) { cuda::softcap(x, cap); }, py::arg("x"), py::arg("cap"));
  module.def(
      "embedding", [](View token_ids, View weight, View out) { cuda::embedding(token_ids, weight, out); },
      py::arg("token_ids"), py::arg("weight"), py::arg("out"));
}

}  // namespace engine::binding
