#include "ops/sampling.h"

#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

void check_indptr(const int64_t* indptr, const char* name, int64_t num_rows, int64_t num_values) {
  if (indptr[0] != 0) refuse(std::string(name) + ": expected 0 first, got " + std::to_string(indptr[0]));
  for (int64_t r = 0; r < num_rows; ++r) {
    if (indptr[r + 1] < indptr[r])
      refuse(std::string(name) + ": expected rising values, row " + std::to_string(r));
  }
  if (indptr[num_rows] != num_values) {
    refuse(std::string(name) + ": expected " + std::to_string(num_values) + " last, got " +
           std::to_string(indptr[num_rows]));
  }
}

void check_ids(const int32_t* ids, const char* name, int64_t num_ids, int64_t vocab_size) {
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      refuse(std::string(name) + ": expected ids in [0, " + std::to_string(vocab_size) + "), got " +
             std::to_string(ids[i]));
    }
  }
}

void check_num_top(const int32_t* num_top, int64_t lowest, int64_t num_rows, int64_t most, int64_t vocab_size) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (num_top[r] < lowest) refuse("num_top_logprobs: expected no negative number");
    if (num_top[r] > most || num_top[r] > vocab_size) {
      refuse("num_top_logprobs: expected at most K=" + std::to_string(most) +
             " and V=" + std::to_string(vocab_size) + ", got " + std::to_string(num_top[r]));
    }
  }
}

void check_shapes(const SamplingTensors& t, SamplingArgs& args, int64_t& num_rows) {
  constexpr auto f32 = DType::kFloat32;
  constexpr auto i32 = DType::kInt32;
  constexpr auto i64 = DType::kInt64;
  Dim R("R"), V("V"), M("M"), biases("num_biases"), K("K");
  expect(t.logits, "logits", {f32}, {R, V}, Layout::kRows);
  expect(t.workspace, "workspace", {f32}, {R, V}, Layout::kRows);
  if (V < 1) refuse("logits: expected at least one token, got none");
  Dim words("ceil(V/32)", (V + 31) / 32);
  expect(t.seen, "seen", {i32}, {R, words}, Layout::kRows);
  expect(t.temperature, "temperature", {f32}, {R});
  expect(t.top_k, "top_k", {i32}, {R});
  expect(t.top_p, "top_p", {f32}, {R});
  expect(t.min_p, "min_p", {f32}, {R});
  expect(t.repetition_penalty, "repetition_penalty", {f32}, {R});
  expect(t.frequency_penalty, "frequency_penalty", {f32}, {R});
  expect(t.presence_penalty, "presence_penalty", {f32}, {R});
  expect(t.seeds, "seeds", {i64}, {R});
  expect(t.choices, "choices", {i32}, {R});
  expect(t.positions, "positions", {i64}, {R});
  Dim rows_plus_one("R+1", R + 1);
  expect(t.token_ids, "token_ids", {i32}, {M});
  expect(t.token_indptr, "token_indptr", {i64}, {rows_plus_one});
  expect(t.prompt_lens, "prompt_lens", {i32}, {R});
  expect(t.bias_ids, "bias_ids", {i32}, {biases});
  expect(t.bias_values, "bias_values", {f32}, {biases});
  expect(t.bias_indptr, "bias_indptr", {i64}, {rows_plus_one});
  if (t.bitmask) expect(*t.bitmask, "bitmask", {i32}, {R, words}, Layout::kRows);
  expect(t.num_top_logprobs, "num_top_logprobs", {i32}, {R});
  expect(t.out_ids, "out_ids", {i32}, {R});
  expect(t.out_logprobs, "out_logprobs", {f32}, {R});
  expect(t.top_ids, "top_ids", {i32}, {R, K});
  expect(t.top_logprobs, "top_logprobs", {f32}, {R, K});
  num_rows = R;
  args.vocab_size = V;
  args.top_stride = K;
  check_indptr(t.token_indptr.as<const int64_t>(), "token_indptr", R, M);
  check_indptr(t.bias_indptr.as<const int64_t>(), "bias_indptr", R, biases);
  check_ids(t.token_ids.as<const int32_t>(), "token_ids", M, V);
  check_ids(t.bias_ids.as<const int32_t>(), "bias_ids", biases, V);
  check_num_top(t.num_top_logprobs.as<const int32_t>(), INT32_MIN, R, K, V);
  for (int64_t r = 0; r < R; ++r) {
    if (t.prompt_lens.as<const int32_t>()[r] < 0) refuse("prompt_lens: expected no negative length");
  }
}

}  // namespace

void sample(cpu::ExecutionContext& context, const SamplingTensors& t) {
  SamplingArgs args{};
  int64_t num_rows = 0;
  check_shapes(t, args, num_rows);
  args.logits = t.logits.as<float>();
  args.logits_stride = t.logits.strides[0];
  args.workspace = t.workspace.as<float>();
  args.workspace_stride = t.workspace.strides[0];
  args.seen = t.seen.as<uint32_t>();
  args.seen_stride = t.seen.strides[0];
  args.temperature = t.temperature.as<const float>();
  args.top_k = t.top_k.as<const int32_t>();
  args.top_p = t.top_p.as<const float>();
  args.min_p = t.min_p.as<const float>();
  args.repetition_penalty = t.repetition_penalty.as<const float>();
  args.frequency_penalty = t.frequency_penalty.as<const float>();
  args.presence_penalty = t.presence_penalty.as<const float>();
  args.seeds = t.seeds.as<const int64_t>();
  args.choices = t.choices.as<const int32_t>();
  args.positions = t.positions.as<const int64_t>();
  args.token_ids = t.token_ids.as<const int32_t>();
  args.token_indptr = t.token_indptr.as<const int64_t>();
  args.prompt_lens = t.prompt_lens.as<const int32_t>();
  args.bias_ids = t.bias_ids.as<const int32_t>();
  args.bias_values = t.bias_values.as<const float>();
  args.bias_indptr = t.bias_indptr.as<const int64_t>();
  if (t.bitmask) {
    args.bitmask = t.bitmask->as<const int32_t>();
    args.bitmask_stride = t.bitmask->strides[0];
  }
  args.num_top_logprobs = t.num_top_logprobs.as<const int32_t>();
  args.out_ids = t.out_ids.as<int32_t>();
  args.out_logprobs = t.out_logprobs.as<float>();
  args.top_ids = t.top_ids.as<int32_t>();
  args.top_logprobs = t.top_logprobs.as<float>();
  args.reports_processed = t.reports_processed;
  args.reports_logits = t.reports_logits;
  const auto kernel = context.kernels().sample;
  context.pool().parallel_for(num_rows, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void score_tokens(cpu::ExecutionContext& context, const ScoringTensors& t) {
  constexpr auto f32 = DType::kFloat32;
  constexpr auto i32 = DType::kInt32;
  Dim R("R"), V("V"), K("K");
  expect(t.logits, "logits", {f32}, {R, V}, Layout::kRows);
  if (V < 1) refuse("logits: expected at least one token, got none");
  expect(t.token_ids, "token_ids", {i32}, {R});
  expect(t.num_top_logprobs, "num_top_logprobs", {i32}, {R});
  expect(t.out_logprobs, "out_logprobs", {f32}, {R});
  expect(t.top_ids, "top_ids", {i32}, {R, K});
  expect(t.top_logprobs, "top_logprobs", {f32}, {R, K});
  check_ids(t.token_ids.as<const int32_t>(), "token_ids", R, V);
  check_num_top(t.num_top_logprobs.as<const int32_t>(), 0, R, K, V);
  ScoringArgs args{};
  args.logits = t.logits.as<float>();
  args.logits_stride = t.logits.strides[0];
  args.vocab_size = V;
  args.token_ids = t.token_ids.as<const int32_t>();
  args.num_top_logprobs = t.num_top_logprobs.as<const int32_t>();
  args.out_logprobs = t.out_logprobs.as<float>();
  args.top_ids = t.top_ids.as<int32_t>();
  args.top_logprobs = t.top_logprobs.as<float>();
  args.top_stride = K;
  args.reports_logits = t.reports_logits;
  const auto kernel = context.kernels().score_tokens;
  context.pool().parallel_for(R, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
