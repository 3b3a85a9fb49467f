// Every item exactly once, whatever the callers, the threads and the grain. Run it under
// ENGINE_SANITIZE=thread as well.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"
#include "engine/error.h"

namespace {

using engine::cpu::ThreadPool;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Plain ints on purpose: a second visit of an item is a data race that the sanitizer sees.
void cover(ThreadPool& pool, int64_t num_items, int64_t grain) {
  std::vector<int> visits(static_cast<size_t>(num_items), 0);
  pool.parallel_for(num_items, grain, [&](int64_t begin, int64_t end) {
    require(begin < end && end <= num_items, "range inside the items");
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  for (int count : visits) require(count == 1, "each item once");
}

void cover_many_shapes() {
  for (int num_threads : {1, 2, 3, 8, 11}) {
    ThreadPool pool(num_threads);
    require(pool.num_threads() == num_threads, "num_threads");
    for (int64_t num_items : {0, 1, 2, 7, 64, 1000}) {
      for (int64_t grain : {-1, 0, 1, 3, 64, 5000}) cover(pool, num_items, grain);
    }
  }
}

// Regions in quick succession, with pauses long enough for the workers to park.
void park_and_wake() {
  ThreadPool pool(4);
  for (int round = 0; round < 300; ++round) {
    for (int i = 0; i < 10; ++i) cover(pool, 40, 1);
    if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void many_callers() {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 300; ++i) cover(pool, 50, 4);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void start_and_stop() {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 5);
    if (i % 2) cover(pool, 20, 1);
  }
}

// Two threads that compute for a while: the caller's time by the clock, the worker's on its core.
void tell_times() {
  for (int num_threads : {1, 2}) {
    ThreadPool pool(num_threads);
    require(pool.caller_seconds() == 0, "no region, no time");
    const auto began = std::chrono::steady_clock::now();
    std::atomic<int64_t> sum{0};
    pool.parallel_for(64, 1, [&](int64_t begin, int64_t end) {
      const auto until = std::chrono::steady_clock::now() + (end - begin) * std::chrono::milliseconds(1);
      while (std::chrono::steady_clock::now() < until) sum += 1;
    });
    const double wall_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    require(pool.caller_seconds() > 0.031 && pool.caller_seconds() <= wall_s, "time of the caller");
    const double most_s = num_threads == 1 ? 0 : wall_s + 0.01;
    require(pool.worker_seconds() >= 0 && pool.worker_seconds() <= most_s, "time of the workers");
    const auto deadline = began + std::chrono::seconds(20);
    while (num_threads > 1 && pool.worker_seconds() == 0) {
      require(std::chrono::steady_clock::now() < deadline, "a worker that computes takes time");
      cover(pool, 1000, 1);
    }
  }
}

void refuse_bad_sizes() {
  for (int num_threads : {0, -3, 4096}) {
    bool refused = false;
    try {
      ThreadPool pool(num_threads);
    } catch (const engine::Error&) {
      refused = true;
    }
    require(refused, "a bad number of threads is refused");
  }
}

}  // namespace

int main() {
  cover_many_shapes();
  park_and_wake();
  many_callers();
  start_and_stop();
  tell_times();
  refuse_bad_sizes();
  std::puts("thread pool: ok");
}
