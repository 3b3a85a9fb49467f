// What this machine can do at most: reading memory, and multiplications and additions in registers,
// of fp32 and of bytes. Compiled and called by limits.py.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

typedef float Lanes __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(64)));

enum { kMaxThreads = 256, kNumChains = 24, kHugePage = 2 << 20 };

// A try is short, so that on a machine with other work some tries are not interrupted.
enum { kNumSteps = 100000, kPieceBytes = 32 << 20 };

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

// Bytes per second, the best of the memory's pieces. Zero when the memory cannot be had.
double read_rate(int64_t num_bytes, int num_threads, int rounds) {
  const int64_t per_thread = kPieceBytes / num_threads / 256 * 256;
  const int64_t num_pieces = num_bytes / kPieceBytes;
  char* data = aligned_alloc(kHugePage, (size_t)(num_bytes / kHugePage + 1) * kHugePage);
  if (data == NULL || num_threads > kMaxThreads) return 0;
#ifdef MADV_HUGEPAGE
  madvise(data, (size_t)num_bytes, MADV_HUGEPAGE);
#endif
  for (int64_t i = 0; i < num_bytes; i += 64) data[i] = (char)i;
  double best = 1e30;
  for (int64_t piece = 0; piece < rounds * num_pieces; ++piece) {
    char* begin = data + piece % num_pieces * kPieceBytes;
    Share shares[kMaxThreads];
    for (int i = 0; i < num_threads; ++i) shares[i] = (Share){begin + i * per_thread, per_thread, 0, 0};
    const double seconds = best_time(read_share, shares, num_threads, 1);
    if (seconds < best) best = seconds;
  }
  free(data);
  return (double)(per_thread * num_threads) / best;
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
  if (num_threads > kMaxThreads) return 0;
  Share shares[kMaxThreads];
  for (int i = 0; i < num_threads; ++i) shares[i] = (Share){NULL, 0, kNumSteps, 0};
  const double seconds = best_time(multiply_share, shares, num_threads, repeats);
  return 2.0 * 16 * kNumChains * kNumSteps * (double)num_threads / seconds;
}

// Sums of products of pairs of bfloat16, by vdpbf16ps.
static void* multiply_bf16_share(void* argument) {
  Share* share = argument;
  share->sum = 0;
#if defined(__AVX512BF16__)
  __m512 chains[kNumChains];
#pragma GCC unroll 24
  for (int j = 0; j < kNumChains; ++j) chains[j] = _mm512_set1_ps((float)j);
  const __m512i pairs = _mm512_set1_epi32(0x3c003c00);
  for (int64_t i = 0; i < share->num_steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kNumChains; ++j) {
      __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(chains[j]) : "v"(pairs));
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < kNumChains; ++j) share->sum += _mm512_reduce_add_ps(chains[j]);
#endif
  return NULL;
}

// Multiplications plus additions per second; 0 where the machine has no such instruction.
double multiply_bf16_rate(int num_threads, int repeats) {
  if (num_threads > kMaxThreads) return 0;
#if defined(__AVX512BF16__)
  const double products_per_step = 32.0 * kNumChains;
#else
  const double products_per_step = 0;
#endif
  Share shares[kMaxThreads];
  for (int i = 0; i < num_threads; ++i) shares[i] = (Share){NULL, 0, kNumSteps, 0};
  const double seconds = best_time(multiply_bf16_share, shares, num_threads, repeats);
  return 2.0 * products_per_step * kNumSteps * (double)num_threads / seconds;
}

// Sums of products of bytes, by the best instruction for it.
static void* multiply_bytes_share(void* argument) {
  Share* share = argument;
  share->sum = 0;
#if defined(__AVX512VNNI__)
  __m512i chains[kNumChains];
#pragma GCC unroll 24
  for (int j = 0; j < kNumChains; ++j) chains[j] = _mm512_set1_epi32(j);
  const __m512i a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x04030201);
  for (int64_t i = 0; i < share->num_steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kNumChains; ++j) {
      chains[j] = _mm512_dpbusd_epi32(chains[j], a, b);
      __asm__ volatile("" : "+v"(chains[j]));  // or the compiler would turn chains that are alike into one
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < kNumChains; ++j) share->sum += _mm512_reduce_add_epi32(chains[j]);
#elif defined(__AVX2__)
  __m256i chains[12];
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) chains[j] = _mm256_set1_epi32(j);
  __m256i a = _mm256_set1_epi16(3);
  for (int64_t i = 0; i < share->num_steps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      // 32 products of bytes are two of these.
      __asm__ volatile("" : "+x"(a));
      chains[j] = _mm256_add_epi32(chains[j], _mm256_madd_epi16(a, a));
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) share->sum += _mm256_extract_epi32(chains[j], 0);
#endif
  return NULL;
}

// Multiplications plus additions per second; 0 where this file knows no instruction for it.
double multiply_bytes_rate(int num_threads, int repeats) {
  if (num_threads > kMaxThreads) return 0;
#if defined(__AVX512VNNI__)
  const double products_per_step = 64.0 * kNumChains;
#elif defined(__AVX2__)
  const double products_per_step = 16.0 * 12;
#else
  const double products_per_step = 0;
#endif
  Share shares[kMaxThreads];
  for (int i = 0; i < num_threads; ++i) shares[i] = (Share){NULL, 0, kNumSteps, 0};
  const double seconds = best_time(multiply_bytes_share, shares, num_threads, repeats);
  return 2.0 * products_per_step * kNumSteps * (double)num_threads / seconds;
}
