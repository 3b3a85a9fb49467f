#include <cmath>
#include <string>

#include "launchers.h"
#include "tensor_checks.h"

namespace engine::cuda {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// Activations; `name` says which.
void expect_heads(const TensorView& view, const char* name, DType dtype, Dim& T, Dim& heads, Dim& D) {
  expect(view, name, {dtype}, {T, heads, D}, Layout::kRows, kDevice);
  expect_vectors(view, name);
}

DType activation_dtype(const TensorView& view, const char* name) {
  Dim a("T"), b("heads"), c("D");
  expect(view, name, {DType::kBFloat16, DType::kFloat16, DType::kFloat32}, {a, b, c}, Layout::kRows, kDevice);
  return view.dtype;
}

// A cache of `dtype`, or of fp8 if and only if there are scales.
CacheArgs cache_args(const TensorView& k_cache, const TensorView& v_cache, const TensorView* kv_scales,
                     DType dtype, Dim& G, Dim& D) {
  Dim N("N"), S("S");
  const DType stored = kv_scales == nullptr ? dtype : DType::kFloat8E4M3;
  expect(k_cache, "k_cache", {stored}, {N, G, S, D}, Layout::kRows, kDevice);
  expect(v_cache, "v_cache", {stored}, {N, G, S, D}, Layout::kRows, kDevice);
  expect_vectors(k_cache, "k_cache");
  expect_vectors(v_cache, "v_cache");
  CacheArgs args{};
  args.keys = k_cache.data;
  args.values = v_cache.data;
  args.k_block_stride = k_cache.strides[0];
  args.v_block_stride = v_cache.strides[0];
  if (kv_scales != nullptr) {
    expect(*kv_scales, "kv_scales", {DType::kFloat32}, {N, G, 2, S}, Layout::kRows, kDevice);
    expect_vectors(*kv_scales, "kv_scales");
    args.scales = kv_scales->as<float>();
    args.scales_block_stride = kv_scales->strides[0];
  }
  if (D < 16 || D > kMaxHeadDim || D % 16 != 0) {
    refuse("k_cache: expected a head dim of 16 to 256 in steps of 16, got " + std::to_string(D));
  }
  if (S < 16 || S % 16 != 0) {
    refuse("k_cache: expected a block size in steps of 16, got " + std::to_string(S));
  }
  args.N = static_cast<int32_t>(N);
  args.G = static_cast<int32_t>(G);
  args.S = static_cast<int32_t>(S);
  args.D = static_cast<int32_t>(D);
  return args;
}

AppendKvArgs append_kv_args(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                            const TensorView& v_cache, const TensorView& slot_ids, const TensorView* kv_scales,
                            Dim& T, Dim& G, Dim& D) {
  const DType dtype = activation_dtype(k, "k");
  expect_heads(k, "k", dtype, T, G, D);
  expect_heads(v, "v", dtype, T, G, D);
  AppendKvArgs args{};
  args.cache = cache_args(k_cache, v_cache, kv_scales, dtype, G, D);
  expect(slot_ids, "slot_ids", {DType::kInt64}, {T}, Layout::kContiguous, kDevice);
  args.k = k.data;
  args.v = v.data;
  args.slot_ids = slot_ids.as<const int64_t>();
  args.k_stride = k.strides[0];
  args.v_stride = v.strides[0];
  args.T = static_cast<int32_t>(T);
  args.format = format_of(dtype);
  return args;
}

void check_numbers(int64_t H, int64_t G, float scale, int64_t window, float softcap) {
  if (G == 0 || H % G != 0) {
    refuse("q: expected a multiple of G=" + std::to_string(G) + " heads, got " + std::to_string(H));
  }
  if (!std::isfinite(scale)) refuse("scale: expected a finite number, got " + std::to_string(scale));
  if (window < 0) refuse("window: expected 0 or more, got " + std::to_string(window));
  if (!std::isfinite(softcap) || softcap < 0) {
    refuse("softcap: expected 0 or more, got " + std::to_string(softcap));
  }
}

}  // namespace

int64_t num_partials(int64_t num_rows, int64_t max_kv_len, int64_t window, int64_t num_heads,
                     int64_t head_dim) {
  const int32_t most = static_cast<int32_t>(max_kv_len);
  const int32_t splits = most_splits(most, static_cast<int32_t>(window < max_kv_len ? window : 0));
  return splits < 2 ? 0 : num_rows * splits * num_heads * partial_stride(head_dim);
}

void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& slot_ids, const TensorView* kv_scales) {
  Dim T("T"), G("G"), D("D");
  append_kv(append_kv_args(k, v, k_cache, v_cache, slot_ids, kv_scales, T, G, D), nullptr, k.stream);
}

void rope_append_kv(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos,
                    const TensorView& sin, const TensorView& positions, const TensorView& k_cache,
                    const TensorView& v_cache, const TensorView& slot_ids, const TensorView* kv_scales) {
  Dim T("T"), H("H"), G("G"), D("D"), P("P"), half("R/2");
  const AppendKvArgs args = append_kv_args(k, v, k_cache, v_cache, slot_ids, kv_scales, T, G, D);
  expect_heads(q, "q", k.dtype, T, H, D);
  expect(cos, "cos", {DType::kFloat32}, {P, half}, Layout::kContiguous, kDevice);
  expect(sin, "sin", {DType::kFloat32}, {P, half}, Layout::kContiguous, kDevice);
  expect(positions, "positions", {DType::kInt32}, {T}, Layout::kContiguous, kDevice);
  if (half > D / 2) {
    refuse("cos: expected at most D/2=" + std::to_string(D / 2) + " columns, got " + std::to_string(half));
  }
  RotationArgs rotation{};
  rotation.q = q.data;
  rotation.cos = cos.as<const float>();
  rotation.sin = sin.as<const float>();
  rotation.positions = positions.as<const int32_t>();
  rotation.q_stride = q.strides[0];
  rotation.H = static_cast<int32_t>(H);
  rotation.P = static_cast<int32_t>(P);
  rotation.half = static_cast<int32_t>(half);
  append_kv(args, &rotation, q.stream);
}

void decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                      const TensorView& sequences, const TensorView& cu_seqlens_q, const TensorView& kv_lens,
                      const TensorView& block_tables, int64_t max_kv_len, float scale, int64_t window,
                      float softcap, const TensorView& out, const TensorView* sinks,
                      const TensorView* kv_scales, const TensorView& partials, const TensorView& arrivals) {
  Dim T("T"), H("H"), G("G"), D("D"), R("R"), B("B"), columns("max_blocks"), P("partials"), A("arrivals");
  const DType dtype = activation_dtype(q, "q");
  expect_heads(q, "q", dtype, T, H, D);
  expect_heads(out, "out", dtype, T, H, D);
  DecodeArgs args{};
  args.cache = cache_args(k_cache, v_cache, kv_scales, dtype, G, D);
  const auto expect_integers = [](const TensorView& view, const char* name,
                                  std::initializer_list<Extent> shape) {
    expect(view, name, {DType::kInt32}, shape, view.rank == 2 ? Layout::kRows : Layout::kContiguous, kDevice);
    return view.as<const int32_t>();
  };
  args.sequences = expect_integers(sequences, "sequences", {R});
  args.kv_lens = expect_integers(kv_lens, "kv_lens", {B});
  args.cu_seqlens_q = expect_integers(cu_seqlens_q, "cu_seqlens_q", {B + 1});
  args.block_tables = expect_integers(block_tables, "block_tables", {B, columns});
  if (sinks != nullptr) {
    expect(*sinks, "sinks", {DType::kFloat32}, {H}, Layout::kContiguous, kDevice);
    args.sinks = sinks->as<const float>();
  }
  check_numbers(H, G, scale, window, softcap);
  if (max_kv_len < 0 || max_kv_len > columns * args.cache.S) {
    refuse("max_kv_len: expected 0 to " + std::to_string(columns * args.cache.S) +
           ", what the block tables hold, got " + std::to_string(max_kv_len));
  }
  args.window = static_cast<int32_t>(window < max_kv_len ? window : 0);
  args.max_splits = most_splits(static_cast<int32_t>(max_kv_len), args.window);
  expect(partials, "partials", {DType::kFloat32}, {P}, Layout::kContiguous, kDevice);
  expect(arrivals, "arrivals", {DType::kInt32}, {A}, Layout::kContiguous, kDevice);
  if (P < num_partials(R, max_kv_len, args.window, H, D)) {
    refuse("partials: expected num_partials(...) floats or more, got " + std::to_string(P));
  }
  const int64_t num_arrivals = G == 0 ? 0 : R * G * ((H / G + kDecodeHeads - 1) / kDecodeHeads);
  if (A < num_arrivals) {
    refuse("arrivals: expected " + std::to_string(num_arrivals) + " counters or more, got " +
           std::to_string(A));
  }
  args.q = q.data;
  args.out = out.data;
  args.partials = partials.as<float>();
  args.arrivals = arrivals.as<int32_t>();
  args.q_stride = q.strides[0];
  args.out_stride = out.strides[0];
  args.block_tables_stride = block_tables.strides[0];
  args.T = static_cast<int32_t>(T);
  args.B = static_cast<int32_t>(B);
  args.R = static_cast<int32_t>(R);
  args.H = static_cast<int32_t>(H);
  args.num_columns = static_cast<int32_t>(columns);
  args.scale = scale;
  args.softcap = softcap;
  args.format = format_of(dtype);
  decode_attention(args, q.stream);
}

}  // namespace engine::cuda
