// Arguments of the CPU kernels: plain data, checked by ops/ before a kernel sees it.
// Row strides are in elements. The letters are those of the design: T step tokens, B sequences,
// H query heads, G KV heads, D head dim, N blocks, S block size, V vocabulary.
#pragma once

#include <cstdint>

namespace engine {

// Work item: one row.
struct RmsNormArgs {
  const float* x;      // [T, n]
  float* residual;     // [T, n], or null: then x is normalised as it is
  const float* weight; // [n]
  float* out;          // [T, n]
  int64_t x_stride, residual_stride, out_stride;
  int64_t n;
  float eps;
};

// Below this temperature the most likely token is taken and no random number is drawn.
inline constexpr float kGreedyTemperature = 1e-6f;

// Work item: one row, that is one sequence to draw a token for.
struct SamplingArgs {
  float* logits;     // [R, V]; only NaN and infinities are replaced
  float* workspace;  // [R, V]
  uint32_t* seen;    // [R, ceil(V / 32)], scratch
  int64_t logits_stride, workspace_stride, seen_stride;
  int64_t vocab_size;

  const float* temperature;         // [R]
  const int32_t* top_k;             // [R], 0 or less: off
  const float* top_p;               // [R], 1: off
  const float* min_p;               // [R], 0: off
  const float* repetition_penalty;  // [R], 1: off
  const float* frequency_penalty;   // [R], 0: off
  const float* presence_penalty;    // [R], 0: off
  const int64_t* seeds;             // [R]
  const int32_t* choices;           // [R]
  const int64_t* positions;         // [R], output position of the token to draw

  const int32_t* token_ids;     // known tokens of all rows, one after the other
  const int64_t* token_indptr;  // [R + 1]
  const int32_t* prompt_lens;   // [R], how many of a row's known tokens are its prompt
  const int32_t* bias_ids;
  const float* bias_values;
  const int64_t* bias_indptr;  // [R + 1]
  const int32_t* bitmask;      // [R, ceil(V / 32)], bit set: token allowed; or null
  int64_t bitmask_stride;

  const int32_t* num_top_logprobs;  // [R], -1: no log-probabilities at all
  int32_t* out_ids;                 // [R], -1 when every token is ruled out
  float* out_logprobs;              // [R], written where num_top_logprobs >= 0
  int32_t* top_ids;                 // [R, K]
  float* top_logprobs;              // [R, K]
  int64_t top_stride;
};

}  // namespace engine
