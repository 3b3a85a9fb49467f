#include "ops/sampling_args.h"

#include <initializer_list>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

void expect_tokens(int64_t vocab_size) {
  if (vocab_size >= 1) return;
  throw Error(ErrorCode::kInvalidArgument, "logits: expected at least one token, got none");
}

}  // namespace

SamplingArgs sampling_args(const SamplingTensors& t, DeviceType device, int64_t& num_rows) {
  constexpr auto f32 = DType::kFloat32;
  constexpr auto i32 = DType::kInt32;
  constexpr auto i64 = DType::kInt64;
  const auto expect_whole = [&](const TensorView& view, const char* name, DType dtype,
                                std::initializer_list<Extent> shape) {
    expect(view, name, {dtype}, shape, Layout::kContiguous, device);
  };
  Dim R("R"), V("V"), M("M"), biases("num_biases"), K("K");
  expect(t.logits, "logits", {f32}, {R, V}, Layout::kRows, device);
  expect(t.workspace, "workspace", {f32}, {R, V}, Layout::kRows, device);
  expect_tokens(V);
  Dim words("ceil(V/32)", (V + 31) / 32);
  expect(t.seen, "seen", {i32}, {R, words}, Layout::kRows, device);
  expect_whole(t.temperature, "temperature", f32, {R});
  expect_whole(t.top_k, "top_k", i32, {R});
  expect_whole(t.top_p, "top_p", f32, {R});
  expect_whole(t.min_p, "min_p", f32, {R});
  expect_whole(t.repetition_penalty, "repetition_penalty", f32, {R});
  expect_whole(t.frequency_penalty, "frequency_penalty", f32, {R});
  expect_whole(t.presence_penalty, "presence_penalty", f32, {R});
  expect_whole(t.seeds, "seeds", i64, {R});
  expect_whole(t.choices, "choices", i32, {R});
  expect_whole(t.positions, "positions", i64, {R});
  Dim rows_plus_one("R+1", R + 1);
  expect_whole(t.token_ids, "token_ids", i32, {M});
  expect_whole(t.token_indptr, "token_indptr", i64, {rows_plus_one});
  expect_whole(t.prompt_lens, "prompt_lens", i32, {R});
  expect_whole(t.bias_ids, "bias_ids", i32, {biases});
  expect_whole(t.bias_values, "bias_values", f32, {biases});
  expect_whole(t.bias_indptr, "bias_indptr", i64, {rows_plus_one});
  if (t.bitmask) expect(*t.bitmask, "bitmask", {i32}, {R, words}, Layout::kRows, device);
  expect_whole(t.num_top_logprobs, "num_top_logprobs", i32, {R});
  expect_whole(t.out_ids, "out_ids", i32, {R});
  expect_whole(t.out_logprobs, "out_logprobs", f32, {R});
  expect_whole(t.top_ids, "top_ids", i32, {R, K});
  expect_whole(t.top_logprobs, "top_logprobs", f32, {R, K});
  SamplingArgs args{};
  num_rows = R;
  args.vocab_size = V;
  args.top_stride = K;
  args.num_token_ids = M;
  args.num_biases = biases;
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
  return args;
}

ScoringArgs scoring_args(const ScoringTensors& t, DeviceType device, int64_t& num_rows) {
  constexpr auto f32 = DType::kFloat32;
  constexpr auto i32 = DType::kInt32;
  const auto expect_whole = [&](const TensorView& view, const char* name, DType dtype,
                                std::initializer_list<Extent> shape) {
    expect(view, name, {dtype}, shape, Layout::kContiguous, device);
  };
  Dim R("R"), V("V"), K("K");
  expect(t.logits, "logits", {f32}, {R, V}, Layout::kRows, device);
  expect_tokens(V);
  expect_whole(t.token_ids, "token_ids", i32, {R});
  expect_whole(t.num_top_logprobs, "num_top_logprobs", i32, {R});
  expect_whole(t.out_logprobs, "out_logprobs", f32, {R});
  expect_whole(t.top_ids, "top_ids", i32, {R, K});
  expect_whole(t.top_logprobs, "top_logprobs", f32, {R, K});
  num_rows = R;
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
  return args;
}

}  // namespace engine::ops
