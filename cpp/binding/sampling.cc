#include "ops/sampling.h"

#include "binding/module.h"
#include "binding/tensor_caster.h"

namespace engine::binding {

namespace py = pybind11;

void bind_sampling(py::module_& module) {
  using View = const TensorView&;
  module.def(
      "sample",
      [](cpu::ExecutionContext& context, View logits, View workspace, View seen, View temperature, View top_k,
         View top_p, View min_p, View repetition_penalty, View frequency_penalty, View presence_penalty,
         View seeds, View choices, View positions, View token_ids, View token_indptr, View prompt_lens,
         View bias_ids, View bias_values, View bias_indptr, const std::optional<TensorView>& bitmask,
         View num_top_logprobs, View out_ids, View out_logprobs, View top_ids, View top_logprobs,
         bool reports_processed, bool reports_logits) {
        ops::sample(context, {logits,
                              workspace,
                              seen,
                              temperature,
                              top_k,
                              top_p,
                              min_p,
                              repetition_penalty,
                              frequency_penalty,
                              presence_penalty,
                              seeds,
                              choices,
                              positions,
                              token_ids,
                              token_indptr,
                              prompt_lens,
                              bias_ids,
                              bias_values,
                              bias_indptr,
                              bitmask,
                              num_top_logprobs,
                              out_ids,
                              out_logprobs,
                              top_ids,
                              top_logprobs,
                              reports_processed,
                              reports_logits});
      },
      py::arg("ctx"), py::kw_only(), py::arg("logits"), py::arg("workspace"), py::arg("seen"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
      py::arg("repetition_penalty"), py::arg("frequency_penalty"), py::arg("presence_penalty"),
      py::arg("seeds"), py::arg("choices"), py::arg("positions"), py::arg("token_ids"), py::arg("token_indptr"),
      py::arg("prompt_lens"), py::arg("bias_ids"), py::arg("bias_values"), py::arg("bias_indptr"),
      py::arg("bitmask"), py::arg("num_top_logprobs"), py::arg("out_ids"), py::arg("out_logprobs"),
      py::arg("top_ids"), py::arg("top_logprobs"), py::arg("reports_processed"), py::arg("reports_logits"),
      ReleaseGil());
  module.def(
      "score_tokens",
      [](cpu::ExecutionContext& context, View logits, View token_ids, View num_top_logprobs, View out_logprobs,
         View top_ids, View top_logprobs, bool reports_logits) {
        ops::score_tokens(context, {logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs,
                                    reports_logits});
      },
      py::arg("ctx"), py::arg("logits"), py::arg("token_ids"), py::arg("num_top_logprobs"),
      py::arg("out_logprobs"), py::arg("top_ids"), py::arg("top_logprobs"), py::arg("reports_logits"),
      ReleaseGil());
}

}  // namespace engine::binding
