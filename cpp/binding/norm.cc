#include "ops/norm.h"

#include "binding/module.h"
#include "binding/tensor_caster.h"

namespace engine::binding {

namespace py = pybind11;

void bind_norm(py::module_& module) {
  module.def("rms_norm", &ops::rms_norm, py::arg("ctx"), py::arg("x"), py::arg("weight"), py::arg("eps"),
             py::arg("out"), ReleaseGil());
  module.def("add_rms_norm", &ops::add_rms_norm, py::arg("ctx"), py::arg("x"), py::arg("residual"),
             py::arg("weight"), py::arg("eps"), py::arg("out"), ReleaseGil());
}

}  // namespace engine::binding
