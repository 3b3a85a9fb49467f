#include "binding/module.h"
#include "binding/sampling_signature.h"
#include "ops_sampling.h"

namespace engine::binding {

namespace py = pybind11;

void bind_cuda_sampling(py::module_& module) {
  module.def("sampling_scratch_bytes", &cuda::sampling_scratch_bytes, py::arg("num_rows"),
             py::arg("vocab_size"), py::arg("num_top"));
  define_sample<const TensorView&>(module, "scratch", &cuda::sample);
  define_score_tokens<const TensorView&>(module, "scratch", &cuda::score_tokens);
}

}  // namespace engine::binding
