// Every part of the binding registers itself with the module; module.cc calls them all.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "engine/kernel_args.h"

namespace engine::binding {

// Errors of the native side become engine.errors.NativeError.
void bind_errors(pybind11::module_& module);
// ExecutionContext, instruction sets, what the build holds.
void bind_context(pybind11::module_& module);
// BlockAllocator, RadixTree, find_repetition.
void bind_cache(pybind11::module_& module);
void bind_norm(pybind11::module_& module);
void bind_sampling(pybind11::module_& module);
// silu_mul, gelu_mul, clamped_swiglu, softcap.
void bind_activation(pybind11::module_& module);
// By its name in Python.
Activation activation_of(const std::string& name);
// rope, append_kv, rope_append_kv, paged_attention.
void bind_attention(pybind11::module_& module);
// PackedMatrix, linear, gated_linear, embedding.
void bind_linear(pybind11::module_& module);
// LoraAdapter, LoraPlan, lora, lora_embedding.
void bind_lora(pybind11::module_& module);

// The submodule `cuda`: its ops refuse in a build without CUDA.
void bind_cuda(pybind11::module_& module);
// Parts of it.
void bind_cuda_rows(pybind11::module_& module);
void bind_cuda_sampling(pybind11::module_& module);

// Releases the interpreter lock around work; the views stay valid because the call holds their
// tensors.
using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace engine::binding
