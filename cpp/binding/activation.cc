#include "ops/gated.h"

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops/softcap.h"

namespace engine::binding {

namespace py = pybind11;

void bind_activation(py::module_& module) {
  module.def("silu_mul", &ops::silu_mul, py::arg("ctx"), py::arg("gate_up"), py::arg("out"), ReleaseGil());
  module.def("gelu_mul", &ops::gelu_mul, py::arg("ctx"), py::arg("gate_up"), py::arg("out"), ReleaseGil());
  module.def("softcap", &ops::softcap, py::arg("ctx"), py::arg("x"), py::arg("cap"), ReleaseGil());
}

}  // namespace engine::binding
