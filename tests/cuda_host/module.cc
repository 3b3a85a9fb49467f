// The ops of the CUDA backend on tensors of the CPU: checks, launchers and kernels as they are, run by the
// emulator.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>

#include "binding/module.h"
#include "faulty_kernels.h"
#include "simt.h"

namespace {

template <typename Convert>
pybind11::array_t<float> convert_all(const pybind11::array_t<float>& x, Convert convert) {
  pybind11::array_t<float> out(x.size());
  for (pybind11::ssize_t i = 0; i < x.size(); ++i) out.mutable_data()[i] = convert(x.data()[i]);
  return out;
}

// What numbers become that are stored as `format` and read again.
pybind11::array_t<float> round_to(const pybind11::array_t<float>& x, const std::string& format) {
  using namespace engine::cuda;
  if (format == "float16") return convert_all(x, [](float y) { return to_float(to_float16(y)); });
  if (format == "bfloat16") return convert_all(x, [](float y) { return to_float(to_bfloat16(y)); });
  return convert_all(x, [](float y) { return to_float(to_float8(y)); });
}

}  // namespace

PYBIND11_MODULE(cuda_host, module) {
  using namespace engine;
  binding::bind_errors(module);
  binding::bind_cuda(module);
  module.def("run_backwards", &simt::run_backwards);
  module.def("round_to", &round_to);
  module.def("run_faulty", &simt::run_faulty);
  module.def("matrix_conflicts", [] { return simt::counters().matrix_conflicts; });
}
