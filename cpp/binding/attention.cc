#include <optional>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops/append_kv.h"
#include "ops/paged_attention.h"
#include "ops/rope.h"

namespace engine::binding {

namespace py = pybind11;

void bind_attention(py::module_& module) {
  module.def(
      "rope",
      [](cpu::ExecutionContext& ctx, const TensorView& q, const TensorView& k, const TensorView& cos,
         const TensorView& sin, const TensorView& positions) {
        ctx.perform([=, &ctx] { ops::rope(ctx, q, k, cos, sin, positions); });
      },
      py::arg("ctx"), py::arg("q"), py::arg("k"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
      ReleaseGil());
  module.def(
      "append_kv",
      [](cpu::ExecutionContext& ctx, const TensorView& k, const TensorView& v, const TensorView& k_cache,
         const TensorView& v_cache, const TensorView& slot_ids, const std::optional<TensorView>& kv_scales) {
        ctx.perform([=, &ctx] {
          ops::append_kv(ctx, k, v, k_cache, v_cache, slot_ids, kv_scales ? &*kv_scales : nullptr);
        });
      },
      py::arg("ctx"), py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slot_ids"),
      py::arg("kv_scales") = py::none(), ReleaseGil());
  module.def(
      "rope_append_kv",
      [](cpu::ExecutionContext& ctx, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& cos, const TensorView& sin, const TensorView& positions, const TensorView& k_cache,
         const TensorView& v_cache, const TensorView& slot_ids, const std::optional<TensorView>& kv_scales) {
        ctx.perform([=, &ctx] {
          ops::rope_append_kv(ctx, q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids,
                              kv_scales ? &*kv_scales : nullptr);
        });
      },
      py::arg("ctx"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"),
      py::arg("positions"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slot_ids"),
      py::arg("kv_scales") = py::none(), ReleaseGil());
  module.def(
      "paged_attention",
      [](cpu::ExecutionContext& ctx, const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
         const TensorView& cu_seqlens_q, const TensorView& kv_lens, const TensorView& block_tables, float scale,
         int64_t window, float softcap, bool is_causal, const TensorView& out,
         const std::optional<TensorView>& sinks, const std::optional<TensorView>& kv_scales) {
        ctx.perform([=, &ctx] {
          ops::paged_attention(ctx, q, k_cache, v_cache, cu_seqlens_q, kv_lens, block_tables, scale, window,
                               softcap, is_causal, out, sinks ? &*sinks : nullptr,
                               kv_scales ? &*kv_scales : nullptr);
        });
      },
      py::arg("ctx"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("cu_seqlens_q"),
      py::arg("kv_lens"), py::arg("block_tables"), py::arg("scale"), py::arg("window"), py::arg("softcap"),
      py::arg("is_causal"), py::arg("out"), py::arg("sinks") = py::none(), py::arg("kv_scales") = py::none(),
      ReleaseGil());
}

}  // namespace engine::binding
