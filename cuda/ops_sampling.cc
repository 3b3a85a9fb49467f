#include "ops_sampling.h"

#include <limits>
#include <string>

#include "sampling_launchers.h"
#include "tensor_checks.h"

namespace engine::cuda {
namespace {

// Hands out parts of the scratch memory, or with null only measures them.
class Parts {
 public:
  explicit Parts(unsigned char* begin) : begin_(begin) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + num_bytes_);
    num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return part;
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  unsigned char* begin_;
  int64_t num_bytes_ = 0;
};

SamplingScratch scratch_in(Parts& parts, int64_t num_rows, int64_t vocab_size, int64_t num_top) {
  using Wide = unsigned long long;
  const int64_t num_chunks = (vocab_size + kSamplingChunk - 1) / kSamplingChunk;
  SamplingScratch scratch{};
  scratch.states = parts.take<SamplingState>(num_rows);
  scratch.bin_weights = parts.take<Wide>(num_rows * kLikelihoodBins);
  scratch.candidates = parts.take<Wide>(num_rows * kMaxCandidates);
  scratch.chunk_best = parts.take<Wide>(num_rows * num_chunks);
  scratch.chunk_weights = parts.take<Wide>(num_rows * num_chunks);
  scratch.chunk_sums = parts.take<double>(num_rows * num_chunks);
  scratch.chunk_top = parts.take<Wide>(num_rows * num_chunks * num_top);
  scratch.chunk_max = parts.take<float>(num_rows * num_chunks);
  scratch.bin_counts = parts.take<uint32_t>(num_rows * kLikelihoodBins);
  scratch.num_chunks = static_cast<int32_t>(num_chunks);
  scratch.num_top = static_cast<int32_t>(num_top);
  return scratch;
}

SamplingScratch checked_scratch(const TensorView& scratch, int64_t num_rows, int64_t vocab_size,
                                int64_t num_top) {
  if (vocab_size > kMaxVocabulary) {
    refuse("logits: expected at most " + std::to_string(kMaxVocabulary) + " tokens, got " +
           std::to_string(vocab_size));
  }
  const int64_t num_chunks = (vocab_size + kSamplingChunk - 1) / kSamplingChunk;
  if (num_rows * num_chunks > std::numeric_limits<int32_t>::max()) refuse("logits: expected fewer rows");
  Dim bytes("bytes");
  expect(scratch, "scratch", {DType::kUInt8}, {bytes}, Layout::kContiguous, kDevice);
  Parts parts(scratch.as<unsigned char>());
  const SamplingScratch laid_out = scratch_in(parts, num_rows, vocab_size, num_top);
  if (bytes < parts.num_bytes() || reinterpret_cast<uintptr_t>(scratch.data) % 16 != 0) {
    refuse("scratch: expected " + std::to_string(parts.num_bytes()) + " bytes at a multiple of 16, got " +
           std::to_string(bytes));
  }
  return laid_out;
}

}  // namespace

int64_t sampling_scratch_bytes(int64_t num_rows, int64_t vocab_size, int64_t num_top) {
  Parts parts(nullptr);
  scratch_in(parts, num_rows, vocab_size, num_top);
  return parts.num_bytes();
}

void sample(const TensorView& scratch, const ops::SamplingTensors& tensors) {
  int64_t num_rows = 0;
  const SamplingArgs args = ops::sampling_args(tensors, kDevice, num_rows);
  const bool counts_tokens = args.num_token_ids > 0;
  sample(args, checked_scratch(scratch, num_rows, args.vocab_size, args.top_stride), num_rows, counts_tokens,
         /*reports=*/true, tensors.logits.stream);
}

void score_tokens(const TensorView& scratch, const ops::ScoringTensors& tensors) {
  int64_t num_rows = 0;
  const ScoringArgs args = ops::scoring_args(tensors, kDevice, num_rows);
  score_tokens(args, checked_scratch(scratch, num_rows, args.vocab_size, args.top_stride), num_rows,
               tensors.logits.stream);
}

}  // namespace engine::cuda
