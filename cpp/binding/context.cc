#include "binding/module.h"

#include <pybind11/stl.h>

#include <utility>

#include "cpu/execution_context.h"
#include "cpu/progress_board.h"
#include "device.h"

namespace engine::binding {

namespace py = pybind11;

void bind_context(py::module_& module) {
  using cpu::ExecutionContext;
  using cpu::ProgressBoard;
  py::class_<ProgressBoard>(module, "ProgressBoard")
      .def(py::init<int>(), py::arg("fd"))
      .def_property_readonly("num_ops", [](const ProgressBoard& self) { return self.num_ops().load(); })
      .def("note_faults", &ProgressBoard::note_faults);

  py::class_<cpu::Recording>(module, "Recording")
      .def(py::init())
      .def_property_readonly("num_ops", &cpu::Recording::num_ops)
      .def("replay", &cpu::Recording::replay, ReleaseGil());

  // Starting and joining threads must not hold the interpreter lock.
  py::class_<ExecutionContext>(module, "ExecutionContext", py::release_gil_before_calling_cpp_dtor())
      .def(py::init<int, std::string_view, bool>(), py::arg("num_threads"), py::arg("isa") = "auto",
           py::arg("rounds_attention") = false, ReleaseGil())
      .def(
          "report_to",
          [](ExecutionContext& self, const ProgressBoard& board) {
            self.pool().count_regions_in(board.num_ops());
          },
          py::arg("board"))
      // Between the two calls everything that bind_attention, bind_linear, bind_norm and the gated activations
      // offer is recorded. The recording holds addresses of buffers, weights and this context.
      .def(
          "begin_recording",
          [](ExecutionContext& self, cpu::Recording& recording) { self.record_into(&recording); },
          py::arg("recording"))
      .def("end_recording", [](ExecutionContext& self) { self.record_into(nullptr); })
      .def_property_readonly("isa", [](const ExecutionContext& self) { return cpu::isa_name(self.isa()); })
      .def_property_readonly("rounds_attention", &ExecutionContext::rounds_attention)
      .def_property_readonly("kernel_seconds",
                             [](ExecutionContext& self) {
                               return std::pair(self.pool().caller_seconds(), self.pool().worker_seconds());
                             })
      .def_property_readonly("num_threads", [](ExecutionContext& self) { return self.pool().num_threads(); });

  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
    return names;
  });
  module.def("cuda_is_compiled", &cuda::is_compiled);
  module.def("num_cuda_devices", &cuda::num_devices);
}

}  // namespace engine::binding
