// What starts the kernels of row_args.h; see launchers.h.
#pragma once

#include "row_args.h"

namespace engine::cuda {

void rms_norm(const RmsNormArgs& args, void* stream);
void gated(const GatedArgs& args, void* stream);
void softcap(const SoftcapArgs& args, void* stream);
void embedding(const EmbeddingArgs& args, void* stream);

}  // namespace engine::cuda
