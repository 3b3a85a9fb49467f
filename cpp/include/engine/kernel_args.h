// Arguments of the CPU kernels: plain data, checked by ops/ before a kernel sees it.
// Row strides are in elements. The letters are those of the design: T step tokens, B sequences,
// H query heads, G KV heads, D head dim, N blocks, S block size, V vocabulary.
#pragma once

#include <cstdint>

namespace engine {

// Work item: one row. Row i is row i % heads of the tensors' i / heads: heads is 1 for [T, n].
struct RmsNormArgs {
  const float* x;       // [T, n], or [T, heads, n]
  float* residual;      // [T, n], or null: then x is normalised as it is
  const float* weight;  // [n]
  float* out;           // as x
  int64_t x_stride, residual_stride, out_stride;
  int64_t n, heads;
  float eps;
};

// Below this temperature the most likely token is taken and no random number is drawn.
inline constexpr float kGreedyTemperature = 1e-6f;

// Work item: one row, that is one sequence to draw a token for.
struct SamplingArgs {
  float* logits;     // [R, V]; NaN and infinities are replaced, all of it if processed ones are reported
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
  int64_t num_token_ids, num_biases;
  const int32_t* bitmask;  // [R, ceil(V / 32)], bit set: token allowed; or null
  int64_t bitmask_stride;

  const int32_t* num_top_logprobs;  // [R], -1: no log-probabilities at all
  int32_t* out_ids;                 // [R], -1 when every token is ruled out
  float* out_logprobs;              // [R], written where num_top_logprobs >= 0
  int32_t* top_ids;                 // [R, K]
  float* top_logprobs;              // [R, K]
  int64_t top_stride;
  bool reports_processed;  // what the token is drawn from, else the raw logits
  bool reports_logits;     // else their log-probabilities
};

// Work item: one row, that is one position whose token is known.
struct ScoringArgs {
  float* logits;  // [R, V]; only NaN and infinities are replaced
  int64_t logits_stride;
  int64_t vocab_size;
  const int32_t* token_ids;         // [R], each in [0, V)
  const int32_t* num_top_logprobs;  // [R], each in [0, K]
  float* out_logprobs;              // [R]
  int32_t* top_ids;                 // [R, K]
  float* top_logprobs;              // [R, K]
  int64_t top_stride;
  bool reports_logits;  // else log-probabilities
};

// Work item: one row.
struct GatedArgs {
  const float* gate_up;  // [T, 2n]: gate, then up
  float* out;            // [T, n]
  int64_t gate_up_stride, out_stride;
  int64_t n;
};

// Work item: one row.
struct ClampedSwigluArgs {
  const float* gate_up;  // [T, 2n]: gate, then up
  float* out;            // [T, n]
  int64_t gate_up_stride, out_stride;
  int64_t n;
  float alpha, limit;
};

// Work item: one row.
struct SoftcapArgs {
  float* x;  // [T, n]
  int64_t x_stride;
  int64_t n;
  float cap;
};

enum class Activation : uint8_t { kGelu, kTanhGelu, kSilu, kRelu, kTanh };

// Work item: one row.
struct ActivateArgs {
  const float* x;  // [T, n]
  float* out;      // [T, n], may be x
  int64_t x_stride, out_stride;
  int64_t n;
  Activation activation;
};

// Work item: one row.
struct LayerNormArgs {
  const float* x;       // [T, n]
  float* residual;      // [T, n], or null: then x is normalised as it is
  const float* weight;  // [n]
  const float* bias;    // [n], or null
  float* out;           // [T, n], may be x or residual
  int64_t x_stride, residual_stride, out_stride;
  int64_t n;
  float eps;
};

// kWeightedSum multiplies each row by its position in the text, counted from 1.
enum class PoolMode : uint8_t { kSum, kWeightedSum, kMax };

// Work item: one text.
struct PoolArgs {
  const float* x;                  // [T, n]
  const int32_t* cu_rows;          // [B + 1]
  const int32_t* first_positions;  // [B], of each text's first row
  float* out;                      // [B, n], what was pooled before
  int64_t x_stride, out_stride;
  int64_t n;
  PoolMode mode;
};

// Work item: one token.
struct RopeArgs {
  float* q;                  // [T, H, D]
  float* k;                  // [T, G, D]
  const float* cos;          // [P, half]
  const float* sin;          // [P, half]
  const int32_t* positions;  // [T], each in [0, P)
  int64_t q_stride, k_stride;
  int64_t H, G, D;
  int64_t half;  // elements i and i + half are a pair, i < half
};

// How keys and values are stored. kInt8: codes, each token and KV head with a scale of its own, beside them in
// [N, G, 2, S], keys' before values'.
enum class CacheFormat : uint8_t { kFloat32, kBFloat16, kInt8 };

// What attention multiplies. kRounded, of bfloat16 caches alone: queries and weights are rounded to bfloat16,
// too; kRoundedDot is the same, to the same bits, by vdpbf16ps (docs/decisions/0033-attention-in-bf16.md).
enum class AttentionFactors : uint8_t { kFloat32, kRounded, kRoundedDot };

// Work item: one token.
struct AppendKvArgs {
  const float* k;           // [T, G, D]
  const float* v;           // [T, G, D]
  void* k_cache;            // [N, G, D, S]
  void* v_cache;            // [N, G, S, D]
  float* kv_scales;         // [N, G, 2, S], or null
  const int64_t* slot_ids;  // [T], each in [0, N * S)
  int64_t k_stride, v_stride, k_block_stride, v_block_stride, scales_block_stride;
  int64_t G, D, S;
  CacheFormat format;
};

// Keys are walked in splits of so many tokens, at absolute positions that are multiples of it: where sums
// are cut, whoever computes them.
inline constexpr int64_t kAttentionSplit = 256;

// Pairs of query row and query head that share a KV head are cut into tiles, which read each key and value
// once for all their pairs.
inline constexpr int64_t kAttentionTilePairs = 32;

// A query row of a step.
struct AttentionRow {
  int64_t partials;      // where the results of its first splits lie, in floats: [num_partials, H, D + 16]
  int32_t row;           // of q and out
  int32_t position;      // of its token
  int32_t newest;        // the last key that it sees
  int32_t first_split;   // that has keys which it sees
  int32_t num_partials;  // splits whose results are joined before those that its last unit computes
};

// A tile against some splits: the pairs of `first_row` and the rows behind it, counted row by row.
struct AttentionUnit {
  int32_t first_row;  // index into the call's AttentionRows
  int32_t first_pair, num_pairs;
  int32_t sequence;  // whose block table leads to the keys
  int32_t first_split, end_split;
  bool is_partial;  // leaves the result of each split to those who join them
};

// Floats of one partial result: values [D], then the maximum and the sum of weights.
static constexpr int64_t partial_floats(int64_t head_dim) { return head_dim + 16; }

// Work item: unit * G + KV head.
struct PagedAttentionArgs {
  const float* q;               // [T, H, D]
  float* out;                   // [T, H, D]
  const void* k_cache;          // [N, G, D, S]
  const void* v_cache;          // [N, G, S, D]
  const float* kv_scales;       // [N, G, 2, S], or null
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* kv_lens;       // [B]
  const int32_t* block_tables;  // [B, max_blocks]
  const float* sinks;           // [H], scores that no value belongs to; or null
  const AttentionRow* rows;     // [T]
  const AttentionUnit* units;
  float* partials;
  int64_t q_stride, out_stride, k_block_stride, v_block_stride, scales_block_stride, block_tables_stride;
  int64_t B, H, G, D, S;
  int64_t window;  // keys that a query sees on each side that it sees, its own included; 0: all
  float scale;
  float softcap;  // 0: none
  CacheFormat format;
  AttentionFactors factors;
  bool is_causal;  // else later keys are seen, too
};

// How a packed matrix stores its weights; see cpu/packed_matrix.h. kBFloat16Dot is stored as kBFloat16, and
// multiplied with activations that are rounded to bfloat16, too (docs/decisions/0020-bf16-products.md).
enum class WeightFormat : uint8_t { kFloat32, kBFloat16, kBFloat16Dot, kInt8, kInt4, kInt4Affine };

static constexpr bool is_quantized(WeightFormat format) { return format >= WeightFormat::kInt8; }

// Output columns in a panel of packed weights.
inline constexpr int64_t kPanelColumns = 32;

// Work item: one panel of outputs for one block of rows; panels of the same block are neighbours.
struct LinearArgs {
  const void* x;       // [T, K] float32; for kBFloat16Dot bfloat16, K being padded with a zero if it is odd
  const void* weight;  // panels [ceil(N / 32)][K][32]
  const float* bias;   // [N], or null
  float* out;          // [T, N]
  int64_t x_stride, out_stride;
  int64_t num_rows, in_features, out_features;  // T, K, N
  int64_t rows_per_block;
  WeightFormat format;
  bool has_bf16_dot;    // the machine has the instruction for kBFloat16Dot
  bool is_out_of_item;  // out is [rows_per_block, 32], of the one item that is computed
};

// Work item: one row.
struct RoundRowsArgs {
  const float* x;  // [T, K]
  uint16_t* out;   // [T, out_stride] bfloat16, zero from K on
  int64_t x_stride, out_stride, in_features;
};

// Quantised products: k that share one scale of the activations, and k that are stored together.
inline constexpr int64_t kActivationGroup = 128;
inline constexpr int64_t kWeightStep = 8;
// k after whose sums a tile adds the outliers, and most rows that a work item takes.
inline constexpr int64_t kQuantizedChain = 512;
inline constexpr int64_t kQuantizedRows = 96;

// The layout of one panel of quantised weights: group after group of k, each its 32 scales, then its
// weights in steps of 8 k, the last step padded. Codes are unsigned: weight 0 is 128 (int8) or 8 (int4).
// int8: scales fp32; of a step the first four k of columns 0 to 31, four bytes a column, then the others.
// int4: scales fp16; a column's four bytes hold the first four k in the low half, the others in the high.
// int4 affine: as int4, but scales fp32 and after them 32 offsets fp32: a weight is scale * code + offset.
struct PanelLayout {
  int64_t group_len;
  int64_t scale_bytes;  // of one group, all columns
  int64_t step_bytes;
};

// (Static, because code shared between instruction sets must not be linked.)
static constexpr PanelLayout panel_layout(WeightFormat format, int64_t group_len) {
  const bool is_int8 = format == WeightFormat::kInt8;
  const int64_t column_bytes = is_int8 ? 4 : format == WeightFormat::kInt4 ? 2 : 8;
  return {group_len, kPanelColumns * column_bytes, kPanelColumns * kWeightStep / (is_int8 ? 1 : 2)};
}

// The code of weight 0. Affine weights have none: -1 makes of QuantizedRows' offsets the sums of the codes.
static constexpr int32_t zero_code(WeightFormat format) {
  return format == WeightFormat::kInt8 ? 128 : format == WeightFormat::kInt4 ? 8 : -1;
}

// What `num_k` k of a panel take.
static constexpr int64_t panel_bytes(const PanelLayout& layout, int64_t num_k) {
  const int64_t num_groups = (num_k + layout.group_len - 1) / layout.group_len;
  return num_groups * layout.scale_bytes + (num_k + kWeightStep - 1) / kWeightStep * layout.step_bytes;
}

// Rows of activations as 8-bit numbers: x = scale * code, but for outliers, whose code is 0. Each row
// is padded to whole groups of kActivationGroup. What rows have one of a group lies side by side for all rows.
struct QuantizedRows {
  int8_t* codes;          // [T, padded K]
  float* scales;          // [padded K / 128, row_stride]
  int32_t* offsets;       // [padded K / group_len, row_stride]: minus weight_zero times the sum of the codes
  uint8_t* has_outliers;  // [padded K / 128, row_stride]; 8 bytes behind the last may be read
  uint64_t* outliers;     // [T, padded K / 64], bit k % 64
  int64_t padded_k, row_stride;
};

// Work item: one row, or some of its groups: `rows` points to the first row and group that are meant.
struct QuantizeRowsArgs {
  const float* x;              // [T, K]
  const float* column_scales;  // [K], what each k is multiplied with first, or null
  float* outliers;             // [T, K], where those of x are stored; or null
  QuantizedRows rows;
  int64_t x_stride, outliers_stride;
  int64_t in_features;
  int64_t group_len;    // of the weights: 32 or 128
  int32_t weight_zero;  // see zero_code
};

// Work item: as LinearArgs.
struct QuantizedLinearArgs {
  const float* x;              // [T, K], of which only outliers are read
  const float* column_scales;  // [K], or null
  QuantizedRows rows;
  const uint8_t* weight;  // panels
  const float* bias;      // [N], or null
  float* out;             // [T, N]
  int64_t x_stride, out_stride;
  int64_t num_rows, in_features, out_features;  // T, K, N
  int64_t rows_per_block;                       // at most kQuantizedRows
  int64_t group_len;
  WeightFormat format;
  bool is_out_of_item;  // as of LinearArgs
};

// Work item: one token.
struct EmbeddingArgs {
  const int32_t* token_ids;     // [T], each in [0, V)
  const void* weight;           // panels
  const float* column_scales;   // [K], what the stored weights are multiplied with, or null
  const int32_t* column_order;  // [K], where each stored column belongs, or null
  float* out;                   // [T, K]
  int64_t out_stride;
  int64_t in_features;  // K
  int64_t group_len;
  WeightFormat format;
};

// Rows of A in a panel of an adapter's weights; see cpu/lora_adapter.h.
inline constexpr int64_t kLoraPanelRanks = 4;

// The columns of a fused layer that one module of an adapter adds to.
struct LoraPart {
  int64_t first_column, num_columns, rank;
  int64_t first_rank;  // of the layer's R
  const void* b;       // panels [ceil(num_columns / 32)][rank][32]
};

// One adapter's rows of a step, at one layer.
struct LoraGroup {
  const void* a;           // panels [ceil(R / 4)][ceil(K / 32)][4][32]; of an embedding [V][R]
  const float* scales;     // [R]
  const LoraPart* parts;   // in order of columns
  const int32_t* row_ids;  // [num_rows], rows of x and out
  float* shrunk;           // [num_rows, R]: x A^T, scaled
  int64_t num_parts, num_rows;
  int64_t rank;                                  // R, of all parts
  int64_t first_shrink_item, first_expand_item;  // of the call
  WeightFormat format;
};

// Work item of lora_shrink: one panel of A for one block of a group's rows; of lora_expand: 32 columns
// of one part for one block of a group's rows; of lora_lookup: one row of a group. Items of a block
// are neighbours, then those of a group.
struct LoraArgs {
  const LoraGroup* groups;
  const float* x;            // [T, K]
  const int32_t* token_ids;  // [T], each in [0, V), for lora_lookup
  float* out;                // [T, N], to which lora_expand adds
  int64_t num_groups;
  int64_t x_stride, out_stride;
  int64_t in_features;  // K
};

// Rows of a group in a block.
inline constexpr int64_t kLoraBlockRows = 32;

}  // namespace engine
