// Persistent workers for the many short parallel regions of a step.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace engine::cpu {

// `num_threads` counts the calling thread. Each thread claims ranges of a share of its own, one behind the
// other, so that what it prefetches at the end of a range is what it needs next; then what is left of the
// others' shares. Ranges are claimed from atomic counters, smaller ones towards the end, so a worker that loses
// its core costs one range and not the region. After a region a worker spins for a while, because the next one
// of the same layer is microseconds away, and then parks.
class ThreadPool {
 public:
  // Throws kUnsupported when the system refuses the threads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Counts regions here from now on, for a supervisor. The counter must outlive the pool.
  void count_regions_in(std::atomic<uint64_t>& counter) { num_regions_ = &counter; }

  // Seconds of CPU time so far: of the callers in regions, by the clock, so that a core lost in between
  // counts; and of the workers, who do nothing but compute, or spin a little while behind a region.
  double caller_seconds() const { return 1e-9 * static_cast<double>(caller_ns_.load()); }
  double worker_seconds() const;

  // Calls body(begin, end) over ranges of at most `grain` items that cover [0, num_items) exactly
  // once, from any thread, and returns when all are done. `body` must not throw. Regions of
  // several callers run one after the other.
  template <typename Body>
  void parallel_for(int64_t num_items, int64_t grain, const Body& body) {
    run(
        num_items, grain,
        [](const void* context, int64_t begin, int64_t end) {
          (*static_cast<const Body*>(context))(begin, end);
        },
        &body);
  }

 private:
  using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

  void stop();
  void run(int64_t num_items, int64_t grain, RangeFunction function, const void* context);
  void run_region(int64_t num_items, int64_t grain, RangeFunction function, const void* context);
  void work(size_t thread, uint32_t seen_epoch);
  void claim_ranges(size_t thread);

  // Neighbouring items, which the threads of one share claim from the front.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::atomic<uint64_t> own_num_regions_{0};
  std::atomic<uint64_t>* num_regions_ = &own_num_regions_;
  std::atomic<int64_t> caller_ns_{0};
  std::mutex mutex_;  // one region at a time

  // The open region. Written while closed; workers read it only after seeing is_open_, and count
  // themselves in num_inside_ while they do, so that it cannot be rewritten under them.
  RangeFunction function_ = nullptr;
  const void* context_ = nullptr;
  int64_t grain_ = 1;
  std::vector<Share> shares_;

  alignas(64) std::atomic<bool> is_open_{false};
  std::atomic<int> num_inside_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // bumped when a region opens, and at the end
  std::atomic<int> num_parked_{0};
  std::atomic<bool> is_stopping_{false};

  std::vector<std::thread> workers_;
};

}  // namespace engine::cpu
