#include "binding/module.h"

PYBIND11_MODULE(_native, module) {
  using namespace engine::binding;
  module.doc() =
      "Native core: prefix cache, block allocator and kernels. Use it through engine.cache and engine.ops.";
  bind_errors(module);
  bind_context(module);
  bind_cache(module);
  bind_norm(module);
  bind_sampling(module);
  bind_activation(module);
  bind_attention(module);
  bind_linear(module);
  bind_lora(module);
  pybind11::module_ cuda =
      module.def_submodule("cuda", "Ops of the CUDA backend; use them through engine.ops.cuda.");
  bind_cuda(cuda);
}
