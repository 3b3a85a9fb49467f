// `sample` and `score_tokens` of one device: the same arguments behind the first, which is the device's own.
#pragma once

#include "binding/module.h"
#include "binding/tensor_caster.h"
#include "ops/sampling_args.h"

namespace engine::binding {

template <typename First, typename... Extra>
void define_sample(pybind11::module_& module, const char* first,
                   void (*sample)(First, const ops::SamplingTensors&), const Extra&... extra) {
  namespace py = pybind11;
  using View = const TensorView&;
  module.def(
      "sample",
      [sample](First own, View logits, View workspace, View seen, View temperature, View top_k, View top_p,
               View min_p, View repetition_penalty, View frequency_penalty, View presence_penalty, View seeds,
               View choices, View positions, View token_ids, View token_indptr, View prompt_lens, View bias_ids,
               View bias_values, View bias_indptr, const std::optional<TensorView>& bitmask,
               View num_top_logprobs, View out_ids, View out_logprobs, View top_ids, View top_logprobs,
               bool reports_processed, bool reports_logits) {
        sample(own, {logits,
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
      py::arg(first), py::kw_only(), py::arg("logits"), py::arg("workspace"), py::arg("seen"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
      py::arg("repetition_penalty"), py::arg("frequency_penalty"), py::arg("presence_penalty"),
      py::arg("seeds"), py::arg("choices"), py::arg("positions"), py::arg("token_ids"), py::arg("token_indptr"),
      py::arg("prompt_lens"), py::arg("bias_ids"), py::arg("bias_values"), py::arg("bias_indptr"),
      py::arg("bitmask"), py::arg("num_top_logprobs"), py::arg("out_ids"), py::arg("out_logprobs"),
      py::arg("top_ids"), py::arg("top_logprobs"), py::arg("reports_processed"), py::arg("reports_logits"),
      extra...);
}

template <typename First, typename... Extra>
void define_score_tokens(pybind11::module_& module, const char* first,
                         void (*score_tokens)(First, const ops::ScoringTensors&), const Extra&... extra) {
  namespace py = pybind11;
  using View = const TensorView&;
  module.def(
      "score_tokens",
      [score_tokens](First own, View logits, View token_ids, View num_top_logprobs, View out_logprobs,
                     View top_ids, View top_logprobs, bool reports_logits) {
        score_tokens(
            own, {logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs, reports_logits});
      },
      py::arg(first), py::arg("logits"), py::arg("token_ids"), py::arg("num_top_logprobs"),
      py::arg("out_logprobs"), py::arg("top_ids"), py::arg("top_logprobs"), py::arg("reports_logits"),
      extra...);
}

}  // namespace engine::binding
