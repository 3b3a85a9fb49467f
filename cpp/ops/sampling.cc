#include "ops/sampling.h"

#include <string>

#include "engine/error.h"

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

void check_values(const SamplingArgs& args, int64_t num_rows) {
  const int64_t K = args.top_stride, V = args.vocab_size;
  check_indptr(args.token_indptr, "token_indptr", num_rows, args.num_token_ids);
  check_indptr(args.bias_indptr, "bias_indptr", num_rows, args.num_biases);
  check_ids(args.token_ids, "token_ids", args.num_token_ids, V);
  check_ids(args.bias_ids, "bias_ids", args.num_biases, V);
  check_num_top(args.num_top_logprobs, INT32_MIN, num_rows, K, V);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (args.prompt_lens[r] < 0) refuse("prompt_lens: expected no negative length");
  }
}

}  // namespace

void sample(cpu::ExecutionContext& context, const SamplingTensors& tensors) {
  int64_t num_rows = 0;
  const SamplingArgs args = sampling_args(tensors, DeviceType::kCpu, num_rows);
  check_values(args, num_rows);
  const auto kernel = context.kernels().sample;
  context.pool().parallel_for(num_rows, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void score_tokens(cpu::ExecutionContext& context, const ScoringTensors& tensors) {
  int64_t num_rows = 0;
  const ScoringArgs args = scoring_args(tensors, DeviceType::kCpu, num_rows);
  check_ids(args.token_ids, "token_ids", num_rows, args.vocab_size);
  check_num_top(args.num_top_logprobs, 0, num_rows, args.top_stride, args.vocab_size);
  const auto kernel = context.kernels().score_tokens;
  context.pool().parallel_for(num_rows, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
