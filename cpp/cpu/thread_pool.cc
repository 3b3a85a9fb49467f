#include "cpu/thread_pool.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>

#include "engine/error.h"

namespace engine::cpu {
namespace {

// Longer than the gaps between the ops of a layer, short against the gap between requests.
constexpr auto kSpinTime = std::chrono::microseconds(200);
constexpr int kSpinsPerLook = 256;
// More would take longer to look through at the end of a region than they save.
constexpr int kMostShares = 8;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() holds or the spin time is over; tells which. Others that want the core are let by now and
// then: with small models those who speak HTTP.
template <typename Condition>
bool spin_until(const Condition& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerLook; ++i) {
      if (done()) return true;
      pause_briefly();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1 || num_threads > 1024) {
    throw Error(ErrorCode::kInvalidArgument,
                "num_threads: expected 1 to 1024, got " + std::to_string(num_threads));
  }
  shares_ = std::vector<Share>(static_cast<size_t>(std::min(num_threads, kMostShares)));
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (size_t i = 1; i < static_cast<size_t>(num_threads); ++i)
      workers_.emplace_back([this, i] { work(i, 0); });
  } catch (const std::system_error& error) {
    stop();
    throw Error(ErrorCode::kUnsupported, "num_threads: the system refused to start " +
                                             std::to_string(num_threads) + " threads: " + error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  is_stopping_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

double ThreadPool::worker_seconds() const {
  double seconds = 0;
  for (const std::thread& worker : workers_) {
    clockid_t clock;
    timespec time;
    const auto handle = const_cast<std::thread&>(worker).native_handle();
    if (pthread_getcpuclockid(handle, &clock) != 0 || clock_gettime(clock, &time) != 0) continue;
    seconds += static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return seconds;
}

void ThreadPool::run(int64_t num_items, int64_t grain, RangeFunction function, const void* context) {
  if (num_items <= 0) return;
  // Not an addition in one: that costs more, and what is lost between two callers harms nothing.
  num_regions_->store(num_regions_->load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  const auto began = std::chrono::steady_clock::now();
  run_region(num_items, std::max<int64_t>(grain, 1), function, context);
  const std::chrono::nanoseconds taken = std::chrono::steady_clock::now() - began;
  caller_ns_.store(caller_ns_.load(std::memory_order_relaxed) + taken.count(), std::memory_order_relaxed);
}

void ThreadPool::run_region(int64_t num_items, int64_t grain, RangeFunction function, const void* context) {
  if (workers_.empty() || num_items <= grain) {
    function(context, 0, num_items);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  function_ = function;
  context_ = context;
  grain_ = grain;
  const auto num_shares = static_cast<int64_t>(shares_.size());
  for (int64_t i = 0; i < num_shares; ++i) {
    Share& share = shares_[static_cast<size_t>(i)];
    share.next.store(num_items * i / num_shares, std::memory_order_relaxed);
    share.end = num_items * (i + 1) / num_shares;
  }
  is_open_.store(true);
  epoch_.fetch_add(1);
  if (num_parked_.load() > 0) epoch_.notify_all();

  claim_ranges(0);

  // All ranges are claimed. A worker that comes now sees a closed region and leaves; wait for
  // those that are still computing.
  is_open_.store(false);
  const auto is_empty = [this] { return num_inside_.load() == 0; };
  while (!spin_until(is_empty)) std::this_thread::yield();
}

void ThreadPool::claim_ranges(size_t thread) {
  for (size_t i = 0; i < shares_.size(); ++i) {
    Share& share = shares_[(thread + i) % shares_.size()];
    int64_t begin = share.next.load(std::memory_order_relaxed);
    while (begin < share.end) {
      // Towards the end ranges become smaller, so that all threads are done at about the same time.
      const int64_t count = std::clamp<int64_t>((share.end - begin) / 2, 1, grain_);
      if (!share.next.compare_exchange_weak(begin, begin + count, std::memory_order_relaxed)) continue;
      function_(context_, begin, begin + count);
      begin = share.next.load(std::memory_order_relaxed);
    }
  }
}

void ThreadPool::work(size_t thread, uint32_t seen_epoch) {
  while (!is_stopping_.load()) {
    const auto has_news = [&] { return epoch_.load() != seen_epoch; };
    if (!spin_until(has_news)) {
      // Counting before the wait re-reads the epoch: either run() sees the count and notifies, or
      // the wait sees the new epoch and returns at once.
      num_parked_.fetch_add(1);
      epoch_.wait(seen_epoch);
      num_parked_.fetch_sub(1);
    }
    seen_epoch = epoch_.load();
    num_inside_.fetch_add(1);
    if (is_open_.load()) claim_ranges(thread);
    num_inside_.fetch_sub(1);
  }
}

}  // namespace engine::cpu
