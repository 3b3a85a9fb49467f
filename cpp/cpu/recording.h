// Calls of ops that are run again in one go, without an interpreter between them.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace engine::cpu {

// The ops of one step, with their arguments: pointers and shapes, not numbers. Whoever replays them keeps the
// buffers and weights alive and where they were, and writes the new inputs into the same buffers.
class Recording {
 public:
  void add(std::function<void()> op) { ops_.push_back(std::move(op)); }
  int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }
  // Throws what an op throws; the ones behind it have not run then.
  void replay() const {
    for (const auto& op : ops_) op();
  }

 private:
  std::vector<std::function<void()>> ops_;
};

}  // namespace engine::cpu
