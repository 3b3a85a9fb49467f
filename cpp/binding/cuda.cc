#include <optional>

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops.h"

namespace engine::binding {

namespace py = pybind11;

namespace {

using Optional = std::optional<TensorView>;

const TensorView* pointer_to(const Optional& view) { return view ? &*view : nullptr; }

void bind_cuda_attention(py::module_& module) {
  module.def(
      "append_kv",
      [](const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
         const TensorView& slot_ids, const Optional& kv_scales) {
        cuda::append_kv(k, v, k_cache, v_cache, slot_ids, pointer_to(kv_scales));
      },
      py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slot_ids"),
      py::arg("kv_scales") = py::none());
  module.def(
      "rope_append_kv",
      [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos,
         const TensorView& sin, const TensorView& positions, const TensorView& k_cache,
         const TensorView& v_cache, const TensorView& slot_ids, const Optional& kv_scales) {
        cuda::rope_append_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids, pointer_to(kv_scales));
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
      py::arg("k_cache"), py::arg("v_cache"), py::arg("slot_ids"), py::arg("kv_scales") = py::none());
  module.def("num_partials", &cuda::num_partials, py::arg("num_rows"), py::arg("max_kv_len"), py::arg("window"),
             py::arg("num_heads"), py::arg("head_dim"));
  module.def(
      "decode_attention",
      [](const TensorView& q, const TensorView& k_cache, const TensorView& v_cache, const TensorView& sequences,
         const TensorView& cu_seqlens_q, const TensorView& kv_lens, const TensorView& block_tables,
         int64_t max_kv_len, float scale, int64_t window, float softcap, const TensorView& out,
         const Optional& sinks, const Optional& kv_scales, const TensorView& partials,
         const TensorView& arrivals) {
        cuda::decode_attention(q, k_cache, v_cache, sequences, cu_seqlens_q, kv_lens, block_tables, max_kv_len,
                               scale, window, softcap, out, pointer_to(sinks), pointer_to(kv_scales), partials,
                               arrivals);
      },
      py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("sequences"), py::arg("cu_seqlens_q"),
      py::arg("kv_lens"), py::arg("block_tables"), py::arg("max_kv_len"), py::arg("scale"), py::arg("window"),
      py::arg("softcap"), py::arg("out"), py::arg("sinks"), py::arg("kv_scales"), py::arg("partials"),
      py::arg("arrivals"));
}

}  // namespace

// A launch takes a few microseconds: the interpreter lock is kept.
void bind_cuda(py::module_& module) {
  bind_cuda_attention(module);
  bind_cuda_rows(module);
  bind_cuda_sampling(module);
}

}  // namespace engine::binding
