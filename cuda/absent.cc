#include "device.h"
#include "engine/error.h"
#include "launchers.h"
#include "row_launchers.h"
#include "sampling_launchers.h"

namespace engine::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::kUnsupported, "this build has no CUDA backend: install where nvcc is found");
}

}  // namespace

bool is_compiled() { return false; }

int num_devices() { return 0; }

void decode_attention(const DecodeArgs&, void*) { refuse(); }
void append_kv(const AppendKvArgs&, const RotationArgs*, void*) { refuse(); }
void rms_norm(const RmsNormArgs&, void*) { refuse(); }
void gated(const GatedArgs&, void*) { refuse(); }
void softcap(const SoftcapArgs&, void*) { refuse(); }
void embedding(const EmbeddingArgs&, void*) { refuse(); }
void sample(const SamplingArgs&, const SamplingScratch&, int64_t, bool, bool, void*) { refuse(); }
void score_tokens(const ScoringArgs&, const SamplingScratch&, int64_t, void*) { refuse(); }

}  // namespace engine::cuda
