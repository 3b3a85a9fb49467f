#include "ops/sampling.h"

#include "binding/module.h"
#include "binding/sampling_signature.h"

namespace engine::binding {

void bind_sampling(pybind11::module_& module) {
  define_sample(module, "ctx", &ops::sample, ReleaseGil());
  define_score_tokens(module, "ctx", &ops::score_tokens, ReleaseGil());
}

}  // namespace engine::binding
