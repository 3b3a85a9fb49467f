#include "ops/norm.h"

#include <string>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "engine/error.h"
#include "ops/pool.h"

namespace engine::binding {

namespace py = pybind11;

namespace {

PoolMode pool_mode_of(const std::string& name) {
  if (name == "sum") return PoolMode::kSum;
  if (name == "weighted_sum") return PoolMode::kWeightedSum;
  if (name == "max") return PoolMode::kMax;
  throw Error(ErrorCode::kInvalidArgument, "mode: expected sum, weighted_sum or max, got '" + name + "'");
}

}  // namespace

void bind_norm(py::module_& module) {
  module.def(
      "rms_norm",
      [](cpu::ExecutionContext& ctx, const TensorView& x, const TensorView& weight, float eps,
         const TensorView& out) { ctx.perform([=, &ctx] { ops::rms_norm(ctx, x, weight, eps, out); }); },
      py::arg("ctx"), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"), ReleaseGil());
  module.def(
      "add_rms_norm",
      [](cpu::ExecutionContext& ctx, const TensorView& x, const TensorView& residual, const TensorView& weight,
         float eps, const TensorView& out) {
        ctx.perform([=, &ctx] { ops::add_rms_norm(ctx, x, residual, weight, eps, out); });
      },
      py::arg("ctx"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("out"),
      ReleaseGil());
  module.def(
      "layer_norm",
      [](cpu::ExecutionContext& ctx, const TensorView& x, const std::optional<TensorView>& residual,
         const TensorView& weight, const std::optional<TensorView>& bias, float eps, const TensorView& out) {
        ops::layer_norm(ctx, x, residual ? &*residual : nullptr, weight, bias ? &*bias : nullptr, eps, out);
      },
      py::arg("ctx"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
      py::arg("out"), ReleaseGil());
  module.def(
      "pool",
      [](cpu::ExecutionContext& ctx, const TensorView& x, const TensorView& cu_rows,
         const TensorView& first_positions, const std::string& mode,
         const TensorView& out) { ops::pool(ctx, x, cu_rows, first_positions, pool_mode_of(mode), out); },
      py::arg("ctx"), py::arg("x"), py::arg("cu_rows"), py::arg("first_positions"), py::arg("mode"),
      py::arg("out"), ReleaseGil());
}

}  // namespace engine::binding
