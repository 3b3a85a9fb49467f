// Where CPU ops run: an instruction set and a pool of threads. Owned by one engine.
#pragma once

#include <string_view>

#include "cpu/attention_schedule.h"
#include "cpu/dispatch.h"
#include "cpu/recording.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace engine::cpu {

class ExecutionContext {
 public:
  // Throws kUnsupported for an instruction set that the machine or the build lacks.
  // `rounds_attention`: attention over a bfloat16 cache multiplies queries and weights rounded to bfloat16.
  ExecutionContext(int num_threads, std::string_view isa, bool rounds_attention)
      : isa_(parse_isa(isa)),
        kernels_(kernels_for(isa_)),
        pool_(num_threads),
        rounds_attention_(rounds_attention) {}

  Isa isa() const { return isa_; }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  Scratch& scratch() { return scratch_; }
  AttentionSchedule& attention_schedule() { return attention_schedule_; }
  bool rounds_attention() const { return rounds_attention_; }

  // Runs an op, and keeps it where a recording is being made.
  template <typename Op>
  void perform(const Op& op) {
    op();
    if (recording_ != nullptr) recording_->add(op);
  }
  // From now on; null ends it.
  void record_into(Recording* recording) { recording_ = recording; }

 private:
  Isa isa_;
  const KernelTable& kernels_;
  ThreadPool pool_;
  Scratch scratch_;
  AttentionSchedule attention_schedule_;
  bool rounds_attention_;
  Recording* recording_ = nullptr;
};

}  // namespace engine::cpu
