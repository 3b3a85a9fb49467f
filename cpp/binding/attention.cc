#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops/append_kv.h"
#include "ops/paged_attention.h"
#include "ops/rope.h"

namespace engine::binding {

namespace py = pybind11;

void bind_attention(py::module_& module) {
  module.def("rope", &ops::rope, py::arg("ctx"), py::arg("q"), py::arg("k"), py::arg("cos"), py::arg("sin"),
             py::arg("positions"), ReleaseGil());
  module.def("append_kv", &ops::append_kv, py::arg("ctx"), py::arg("k"), py::arg("v"), py::arg("k_cache"),
             py::arg("v_cache"), py::arg("slot_ids"), ReleaseGil());
  module.def("paged_attention", &ops::paged_attention, py::arg("ctx"), py::arg("q"), py::arg("k_cache"),
             py::arg("v_cache"), py::arg("cu_seqlens_q"), py::arg("kv_lens"), py::arg("block_tables"),
             py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("is_causal"), py::arg("out"),
             ReleaseGil());
}

}  // namespace engine::binding
