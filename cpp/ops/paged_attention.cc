#include "ops/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/tensor_spec.h"
#include "ops/kv_cache.h"

namespace engine::ops {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

void check_numbers(int64_t H, int64_t G, int64_t D, int64_t S, float scale, int64_t window, float softcap) {
  if (G == 0 || H % G != 0) {
    refuse("q: expected a multiple of G=" + std::to_string(G) + " heads, got " + std::to_string(H));
  }
  if (D < 16 || D > 256 || D % 16 != 0) {
    refuse("q: expected a head dim of 16 to 256 in steps of 16, got " + std::to_string(D));
  }
  if (S < 16 || S > 256 || S % 16 != 0) {
    refuse("k_cache: expected a block size of 16 to 256 in steps of 16, got " + std::to_string(S));
  }
  if (!std::isfinite(scale)) refuse("scale: expected a finite number, got " + std::to_string(scale));
  if (window < 0) refuse("window: expected 0 or more, got " + std::to_string(window));
  if (!std::isfinite(softcap) || softcap < 0) {
    refuse("softcap: expected 0 or more, got " + std::to_string(softcap));
  }
}

[[noreturn]] void refuse_sequence(int64_t b, const char* what, int64_t expected, int64_t got) {
  refuse(std::string(what) + " " + std::to_string(expected) + " for sequence " + std::to_string(b) + ", got " +
         std::to_string(got));
}

// The block ids of the tokens that the rows see; nothing else of the table is read.
void check_blocks(const PagedAttentionArgs& args, int64_t b, int64_t num_rows, int64_t N, int64_t max_blocks) {
  const int64_t kv_len = args.kv_lens[b];
  const int64_t end = (kv_len + args.S - 1) / args.S;
  if (end > max_blocks) refuse_sequence(b, "block_tables: expected columns, at least", end, max_blocks);
  const int64_t oldest = args.window > 0 ? std::max<int64_t>(kv_len - num_rows - args.window + 1, 0) : 0;
  const int32_t* block_table = args.block_tables + b * args.block_tables_stride;
  uint32_t largest = 0;  // as unsigned, a negative id is larger than all others
  for (int64_t i = oldest / args.S; i < end; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(block_table[i]));
  }
  if (largest >= N) {
    refuse_sequence(b, "block_tables: expected block ids from 0 to", N - 1, static_cast<int32_t>(largest));
  }
}

// All that the kernel indexes memory with.
void check_sequences(const PagedAttentionArgs& args, int64_t T, int64_t N, int64_t max_blocks) {
  if (args.cu_seqlens_q[0] != 0) {
    refuse("cu_seqlens_q: expected to begin with 0, got " + std::to_string(args.cu_seqlens_q[0]));
  }
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t begin = args.cu_seqlens_q[b], end = args.cu_seqlens_q[b + 1];
    if (end < begin) refuse_sequence(b, "cu_seqlens_q: expected an end of at least", begin, end);
    if (end > T) refuse_sequence(b, "cu_seqlens_q: expected an end of at most T, that is", T, end);
    if (args.kv_lens[b] < end - begin) {
      refuse_sequence(b, "kv_lens: expected at least the number of rows,", end - begin, args.kv_lens[b]);
    }
    if (end > begin) check_blocks(args, b, end - begin, N, max_blocks);
  }
  if (args.cu_seqlens_q[args.B] != T) {
    refuse("cu_seqlens_q: expected to end with T=" + std::to_string(T) + ", got " +
           std::to_string(args.cu_seqlens_q[args.B]));
  }
}

AttentionFactors choose_factors(const cpu::ExecutionContext& context, CacheFormat format) {
  if (!context.rounds_attention() || format != CacheFormat::kBFloat16) return AttentionFactors::kFloat32;
  return cpu::has_fast_bf16_dot(context.isa()) ? AttentionFactors::kRoundedDot : AttentionFactors::kRounded;
}

void run(cpu::ExecutionContext& context, PagedAttentionArgs& args, const std::vector<AttentionUnit>& units) {
  args.units = units.data();
  const int64_t num_items = static_cast<int64_t>(units.size()) * args.G;
  const auto kernel = context.kernels().paged_attention;
  // Backwards: the last rows of a prefill see the most keys, and long items are best begun early.
  context.pool().parallel_for(
      num_items, 1, [&](int64_t begin, int64_t end) { kernel(args, num_items - end, num_items - begin); });
}

}  // namespace

void paged_attention(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k_cache,
                     const TensorView& v_cache, const TensorView& cu_seqlens_q, const TensorView& kv_lens,
                     const TensorView& block_tables, float scale, int64_t window, float softcap, bool is_causal,
                     const TensorView& out, const TensorView* sinks, const TensorView* kv_scales) {
  Dim T("T"), B("B"), H("H"), G("G"), D("D"), N("N"), S("S"), max_blocks("max_blocks");
  expect(q, "q", {DType::kFloat32}, {T, H, D}, Layout::kRows);
  const CacheFormat format = expect_cache(k_cache, v_cache, kv_scales, N, G, D, S);
  expect(kv_lens, "kv_lens", {DType::kInt32}, {B});
  expect(cu_seqlens_q, "cu_seqlens_q", {DType::kInt32}, {B + 1});
  expect(block_tables, "block_tables", {DType::kInt32}, {B, max_blocks}, Layout::kRows);
  expect(out, "out", {DType::kFloat32}, {T, H, D}, Layout::kRows);
  if (sinks != nullptr) expect(*sinks, "sinks", {DType::kFloat32}, {H});
  check_numbers(H, G, D, S, scale, window, softcap);
  PagedAttentionArgs args{
      .q = q.as<const float>(),
      .out = out.as<float>(),
      .k_cache = k_cache.data,
      .v_cache = v_cache.data,
      .kv_scales = kv_scales == nullptr ? nullptr : kv_scales->as<const float>(),
      .cu_seqlens_q = cu_seqlens_q.as<const int32_t>(),
      .kv_lens = kv_lens.as<const int32_t>(),
      .block_tables = block_tables.as<const int32_t>(),
      .sinks = sinks == nullptr ? nullptr : sinks->as<const float>(),
      .rows = nullptr,
      .units = nullptr,
      .partials = nullptr,
      .q_stride = q.strides[0],
      .out_stride = out.strides[0],
      .k_block_stride = k_cache.strides[0],
      .v_block_stride = v_cache.strides[0],
      .scales_block_stride = kv_scales == nullptr ? 0 : kv_scales->strides[0],
      .block_tables_stride = block_tables.strides[0],
      .B = B,
      .H = H,
      .G = G,
      .D = D,
      .S = S,
      .window = window,
      .scale = scale,
      .softcap = softcap,
      .format = format,
      .factors = choose_factors(context, format),
      .is_causal = is_causal,
  };
  check_sequences(args, T, N, max_blocks);
  cpu::AttentionSchedule& schedule = context.attention_schedule();
  const auto lock = schedule.lock();
  schedule.build(args, context.pool().num_threads());
  const auto partials =
      context.scratch().take(schedule.num_partial_floats() * static_cast<int64_t>(sizeof(float)));
  args.partials = reinterpret_cast<float*>(partials.data);
  args.rows = schedule.rows().data();
  run(context, args, schedule.partial_units());
  run(context, args, schedule.joining_units());
}

}  // namespace engine::ops
