#include "sampling_launchers.h"

#include "kernels/sampling_draw.cuh"
#include "kernels/sampling_filter.cuh"
#include "kernels/sampling_prepare.cuh"
#include "kernels/sampling_report.cuh"
#include "launch.h"

namespace engine::cuda {
namespace {

template <typename Scores>
void report(const Scores& scores, dim3 rows, dim3 chunks, void* stream) {
  const dim3 threads(kSamplingThreads);
  launch(report_chunks<Scores>, chunks, threads, sizeof(ReportShared), stream, scores);
  launch(report_rows<Scores>, rows, threads, sizeof(ReportShared), stream, scores);
}

}  // namespace

// Blocks of rows that need none of a kernel leave it at once: what rows ask for is known on the device alone.
void sample(const SamplingArgs& args, const SamplingScratch& scratch, int64_t num_rows, bool counts_tokens,
            bool reports, void* stream) {
  if (num_rows == 0) return;
  const dim3 rows(static_cast<unsigned>(num_rows)), threads(kSamplingThreads);
  const dim3 chunks(static_cast<unsigned>(num_rows * scratch.num_chunks));
  if (counts_tokens) launch(count_tokens, rows, dim3(kCountingThreads), 0, stream, args);
  launch(prepare_row, chunks, threads, sizeof(PrepareShared), stream, args, scratch);
  launch(count_bins, chunks, threads, sizeof(CountBinsShared), stream, args, scratch);
  launch(find_cut<ByCount>, chunks, threads, sizeof(FindCutShared), stream, args, scratch);
  launch(find_cut<ByWeight>, chunks, threads, sizeof(FindCutShared), stream, args, scratch);
  launch(draw_token, chunks, threads, sizeof(DrawShared), stream, args, scratch);
  if (reports) report(DrawnScores{args, scratch}, rows, chunks, stream);
}

void score_tokens(const ScoringArgs& args, const SamplingScratch& scratch, int64_t num_rows, void* stream) {
  if (num_rows == 0) return;
  const dim3 rows(static_cast<unsigned>(num_rows));
  report(KnownScores{args, scratch}, rows, dim3(static_cast<unsigned>(num_rows * scratch.num_chunks)), stream);
}

}  // namespace engine::cuda
