#include "ops/lora.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "engine/error.h"

namespace engine::binding {
namespace {

namespace py = pybind11;
using cpu::LoraAdapter;
using ops::LoraPlan;

using Module = std::tuple<int64_t, int64_t, int64_t, float>;
using Site = std::tuple<int64_t, bool, std::vector<Module>>;

WeightFormat format_of(const std::string& dtype) {
  if (dtype == "bfloat16") return WeightFormat::kBFloat16;
  if (dtype == "float32") return WeightFormat::kFloat32;
  throw Error(ErrorCode::kInvalidArgument, "dtype: expected bfloat16 or float32, got '" + dtype + "'");
}

std::vector<cpu::LoraSite> sites_of(const std::vector<Site>& sites) {
  std::vector<cpu::LoraSite> made;
  for (const auto& [in_features, is_embedding, modules] : sites) {
    cpu::LoraSite& site = made.emplace_back(cpu::LoraSite{in_features, is_embedding, {}});
    for (const auto& [first_column, num_columns, rank, scale] : modules) {
      site.modules.push_back({first_column, num_columns, rank, scale});
    }
  }
  return made;
}

}  // namespace

void bind_lora(py::module_& module) {
  py::class_<LoraAdapter, std::shared_ptr<LoraAdapter>>(module, "LoraAdapter")
      .def(py::init([](const std::string& dtype, const std::vector<Site>& sites) {
             return std::make_shared<LoraAdapter>(format_of(dtype), sites_of(sites));
           }),
           py::arg("dtype"), py::arg("sites"))
      .def("pack", &LoraAdapter::pack, py::arg("site"), py::arg("module"), py::arg("a"), py::arg("b"),
           ReleaseGil())
      .def_property_readonly("num_sites", &LoraAdapter::num_sites)
      .def_property_readonly("num_bytes", &LoraAdapter::num_bytes)
      .def_property_readonly("is_complete", &LoraAdapter::is_complete);

  py::class_<LoraPlan>(module, "LoraPlan")
      .def(py::init([](const std::vector<std::shared_ptr<LoraAdapter>>& adapters, const TensorView& cu_rows,
                       const TensorView& row_ids) {
             return std::make_unique<LoraPlan>(
                 std::vector<std::shared_ptr<const LoraAdapter>>(adapters.begin(), adapters.end()), cu_rows,
                 row_ids);
           }),
           py::arg("adapters"), py::arg("cu_rows"), py::arg("row_ids"));

  module.def("lora", &ops::lora, py::arg("ctx"), py::arg("x"), py::arg("site"), py::arg("plan"),
             py::arg("workspace"), py::arg("out"), ReleaseGil());
  module.def("lora_embedding", &ops::lora_embedding, py::arg("ctx"), py::arg("token_ids"), py::arg("site"),
             py::arg("plan"), py::arg("workspace"), py::arg("out"), ReleaseGil());
}

}  // namespace engine::binding
