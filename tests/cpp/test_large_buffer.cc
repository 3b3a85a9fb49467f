// Buffers side by side: each has its own bytes, zero at first, whatever else is made and freed around it.
// Run it under ENGINE_SANITIZE=address as well.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/large_buffer.h"
#include "engine/error.h"

namespace {

using engine::cpu::LargeBuffer;
using Place = LargeBuffer::Place;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

bool has_only(const LargeBuffer& buffer, char value) {
  const char* data = static_cast<const char*>(buffer.data());
  for (int64_t i = 0; i < buffer.num_bytes(); ++i) {
    if (data[i] != value) return false;
  }
  return true;
}

struct Marked {
  std::unique_ptr<LargeBuffer> buffer;
  char mark;
};

Marked make(int64_t num_bytes, Place place, char mark) {
  auto buffer = std::make_unique<LargeBuffer>(num_bytes, place);
  require(buffer->num_bytes() == num_bytes && buffer->is_writable(), "as asked for");
  require(reinterpret_cast<uintptr_t>(buffer->data()) % 64 == 0, "at a cache line");
  require(has_only(*buffer, 0), "zero at first");
  std::memset(buffer->data(), mark, static_cast<size_t>(num_bytes));
  return {std::move(buffer), mark};
}

// Sizes around those where a buffer gets pages, or a mapping, of its own.
void make_and_free(unsigned seed) {
  std::mt19937 draw(seed);
  const std::vector<int64_t> sizes = {
      1, 63, 64, 65, 4096, 700'000, (2 << 20) - 1, 2 << 20, 5 << 20, (32 << 20) + 1};
  std::vector<Marked> alive;
  for (int i = 0; i < 150; ++i) {
    const auto place = draw() % 4 == 0 ? Place::kAlone : Place::kBesideOthers;
    alive.push_back(make(sizes[draw() % (i % 30 == 0 ? 10 : 8)], place, static_cast<char>(1 + draw() % 100)));
    if (draw() % 2 == 0) {
      std::swap(alive[draw() % alive.size()], alive.back());
      require(has_only(*alive.back().buffer, alive.back().mark), "nobody else wrote here");
      alive.pop_back();
    }
  }
  for (const Marked& each : alive) require(has_only(*each.buffer, each.mark), "nobody else wrote here");
}

void lie_side_by_side() {
  const LargeBuffer first(1000, Place::kBesideOthers), second(1000, Place::kBesideOthers);
  require(static_cast<char*>(second.data()) - static_cast<char*>(first.data()) == 1024, "neighbours");
}

void refuse_what_is_not_there() {
  for (Place place : {Place::kAlone, Place::kBesideOthers}) {
    try {
      const LargeBuffer buffer(int64_t{1} << 60, place);
      require(false, "an exabyte");
    } catch (const engine::Error& error) {
      require(error.code() == engine::ErrorCode::kUnsupported, "the system refused");
    }
  }
}

}  // namespace

int main() {
  lie_side_by_side();
  refuse_what_is_not_there();
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 3; ++seed) threads.emplace_back(make_and_free, seed);
  for (std::thread& thread : threads) thread.join();
  std::puts("ok");
}
