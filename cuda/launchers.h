// What starts each kernel. `stream` is a cudaStream_t; absent.cc refuses in a build without CUDA.
#pragma once

#include "kernel_args.h"

namespace engine::cuda {

// `rotation` may be null: then keys are stored as they are.
void append_kv(const AppendKvArgs& args, const RotationArgs* rotation, void* stream);

void decode_attention(const DecodeArgs& args, void* stream);

}  // namespace engine::cuda
