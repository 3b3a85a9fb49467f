// What starts the kernels of sampling; see launchers.h.
#pragma once

#include "sampling_args.h"

namespace engine::cuda {

// Draws a token for each of `num_rows` rows. `counts_tokens`: some row may have penalties; `reports`: some row
// may want scores.
void sample(const SamplingArgs& args, const SamplingScratch& scratch, int64_t num_rows, bool counts_tokens,
            bool reports, void* stream);

void score_tokens(const ScoringArgs& args, const SamplingScratch& scratch, int64_t num_rows, void* stream);

}  // namespace engine::cuda
