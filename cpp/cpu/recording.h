// Calls of ops that are run again in one go, without an interpreter between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace engine::cpu {

// The ops of one step, with their arguments: pointers and shapes, not numbers. Whoever replays them keeps the
// buffers and weights alive and where they were, and writes the new inputs into the same buffers.
class Recording {
 public:
  template <typename Op>
  void add(const Op& op) {
    static_assert(std::is_trivially_copyable_v<Op> && alignof(Op) <= kAlignment);
    const size_t start = arguments_.size();
    arguments_.resize(start + (sizeof(Op) + kAlignment - 1) / kAlignment * kAlignment);
    std::memcpy(arguments_.data() + start, &op, sizeof(Op));
    calls_.push_back({[](const void* copy) { (*static_cast<const Op*>(copy))(); }, start});
  }
  int64_t num_ops() const { return static_cast<int64_t>(calls_.size()); }

  // Throws what an op throws; the ones behind it have not run then.
  void replay() const {
    size_t prefetched = 0;
    for (size_t i = 0; i < calls_.size(); ++i) {
      // An op's weights drive the arguments of all others out of the caches.
      const size_t end = i + 2 < calls_.size() ? calls_[i + 2].start : arguments_.size();
      for (; prefetched < end; prefetched += kCacheLine) __builtin_prefetch(arguments_.data() + prefetched);
      calls_[i].run(arguments_.data() + calls_[i].start);
    }
  }

 private:
  static constexpr size_t kAlignment = alignof(std::max_align_t), kCacheLine = 64;

  struct Call {
    void (*run)(const void*);
    size_t start;
  };
  std::vector<Call> calls_;
  std::vector<std::byte> arguments_;  // of all calls, one behind the other
};

}  // namespace engine::cpu
