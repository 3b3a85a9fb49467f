// What the sampling kernels hand to one another, beside SamplingArgs and ScoringArgs of engine/kernel_args.h,
// whose pointers are here of the device.
#pragma once

#include <cstdint>

#include "engine/kernel_args.h"

namespace engine::cuda {

// Tokens of a row that one block looks at. A constant, so that nothing depends on how many rows there are.
inline constexpr int kSamplingChunk = 8192;

// Tokens are put in bins by their likelihood, 2^-t of the likeliest's: bin (int)(t * kBinsPerOctave).
inline constexpr int kLikelihoodBins = 1024;
inline constexpr float kBinsPerOctave = 26.0f;

// Tokens of the bin in which a filter cuts that are kept in a list; where there are more the row is read again.
inline constexpr int kMaxCandidates = 4096;

// Weights are integers, the likeliest token's being 2^40, so that sums are exact and have no order: a total of
// 2^23 tokens fits in 64 bits. A weight is off by 2^-41 of the likeliest at most.
inline constexpr float kLikeliestWeight = 0x1p40f;
inline constexpr int64_t kMaxVocabulary = int64_t{1} << 23;

// How far the sampling of a row has come.
struct SamplingState {
  unsigned long long cut;     // tokens that rank below it are dropped
  unsigned long long before;  // count or weight of the bins above `bin`
  unsigned long long target;  // of count or weight, reached in `bin`
  int32_t bin;                // in which the filter at work cuts
  uint32_t num_candidates;    // of them, above kMaxCandidates if the list does not hold them all
  uint32_t num_done[4];       // blocks of each kernel that are through
};

// Of R rows in C chunks; reports of K tokens.
struct SamplingScratch {
  SamplingState* states;              // [R]
  unsigned long long* bin_weights;    // [R, kLikelihoodBins]
  unsigned long long* candidates;     // [R, kMaxCandidates], ranks
  unsigned long long* chunk_best;     // [R, C], rank of the likeliest
  unsigned long long* chunk_weights;  // [R, C]
  double* chunk_sums;                 // [R, C], of e^(x - the chunk's largest)
  unsigned long long* chunk_top;      // [R, C, K], ranks
  float* chunk_max;                   // [R, C]
  uint32_t* bin_counts;               // [R, kLikelihoodBins]
  int32_t num_chunks;                 // C
  int32_t num_top;                    // K
};

}  // namespace engine::cuda
