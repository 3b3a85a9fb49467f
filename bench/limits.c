// What this machine can do at most: reading memory, and fp32 multiplications and additions in
// registers. Compiled and called by limits.py.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

typedef float Lanes __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(64)));

enum { kMaxThreads = 256, kNumChains = 24, kHugePage = 2 << 20 };

typedef struct {
  const char* begin;
  int64_t num_bytes;
  int64_t num_steps;
  double sum;
} Share;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Best time of `repeats` runs of `work` on all shares at once.
static double best_time(void* (*work)(void*), Share* shares, int num_threads, int repeats) {
  double best = 1e30;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_t threads[kMaxThreads];
    const double start = now();
    for (int i = 1; i < num_threads; ++i) pthread_create(&threads[i], NULL, work, &shares[i]);
    work(&shares[0]);
    for (int i = 1; i < num_threads; ++i) pthread_join(threads[i], NULL);
    const double elapsed = now() - start;
    if (elapsed < best) best = elapsed;
  }
  return best;
}

static void* read_share(void* argument) {
  Share* share = argument;
  Words sums[4] = {0};
  for (int64_t i = 0; i < share->num_bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(share->begin + i + 64 * j + 4096);
      sums[j] ^= *(const Words*)(share->begin + i + 64 * j);
    }
  }
  share->sum = (double)(sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
  return NULL;
}

// Bytes per second. Zero when the memory cannot be had.
double read_rate(int64_t num_bytes, int num_threads, int repeats) {
  const int64_t per_thread = num_bytes / num_threads / 256 * 256;
  char* data = aligned_alloc(kHugePage, (size_t)(num_bytes / kHugePage + 1) * kHugePage);
  if (data == NULL || num_threads > kMaxThreads) return 0;
#ifdef MADV_HUGEPAGE
  madvise(data, (size_t)num_bytes, MADV_HUGEPAGE);
#endif
  for (int64_t i = 0; i < num_bytes; i += 64) data[i] = (char)i;
  Share shares[kMaxThreads];
  for (int i = 0; i < num_threads; ++i) shares[i] = (Share){data + i * per_thread, per_thread, 0, 0};
  const double seconds = best_time(read_share, shares, num_threads, repeats);
  free(data);
  return (double)(per_thread * num_threads) / seconds;
}

static void* multiply_share(void* argument) {
  Share* share = argument;
  Lanes chains[kNumChains];
  for (int j = 0; j < kNumChains; ++j) chains[j] = (Lanes){0} + (float)j;
  const Lanes factor = (Lanes){0} + 0.999f, term = (Lanes){0} + 0.001f;
  for (int64_t i = 0; i < share->num_steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kNumChains; ++j) chains[j] = chains[j] * factor + term;
  }
  share->sum = 0;
  for (int j = 0; j < kNumChains; ++j) share->sum += chains[j][0];
  return NULL;
}

// Multiplications plus additions per second.
double multiply_rate(int num_threads, int repeats) {
  const int64_t num_steps = 1000000;
  if (num_threads > kMaxThreads) return 0;
  Share shares[kMaxThreads];
  for (int i = 0; i < num_threads; ++i) shares[i] = (Share){NULL, 0, num_steps, 0};
  const double seconds = best_time(multiply_share, shares, num_threads, repeats);
  return 2.0 * 16 * kNumChains * (double)num_steps * num_threads / seconds;
}
