// Children of all nodes of a tree in one open-addressing hash table.
//
// One table for the whole tree instead of one a node: no allocation when a node gets its first
// child, and two cache lines a step down the tree. The capacity is fixed at twice the most entries
// there can be, so that it never grows; erasing shifts entries back, so that it never fills with
// tombstones.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace engine::cache {

using NodeIndex = std::uint32_t;
inline constexpr NodeIndex kNoNode = 0;

class ChildTable {
 public:
  explicit ChildTable(std::size_t max_entries)
      : slots_(std::bit_ceil(std::max<std::size_t>(2 * max_entries, 2))), mask_(slots_.size() - 1) {}

  std::size_t size() const { return size_; }

  // The entry with this hash for which `is_wanted(index)`, or kNoNode.
  template <class IsWanted>
  NodeIndex find(std::uint32_t hash, IsWanted&& is_wanted) const {
    for (std::size_t at = hash & mask_; slots_[at].node != kNoNode; at = (at + 1) & mask_) {
      if (slots_[at].hash == hash && is_wanted(slots_[at].node)) return slots_[at].node;
    }
    return kNoNode;
  }

  // The node must not be in the table, and the table must not hold max_entries yet.
  void insert(std::uint32_t hash, NodeIndex node) {
    std::size_t at = hash & mask_;
    while (slots_[at].node != kNoNode) at = (at + 1) & mask_;
    slots_[at] = {hash, node};
    ++size_;
  }

  // `node` must be in the table under this hash.
  void replace(std::uint32_t hash, NodeIndex node, NodeIndex by) { slots_[slot_of(hash, node)].node = by; }

  void erase(std::uint32_t hash, NodeIndex node) {
    std::size_t hole = slot_of(hash, node);
    for (std::size_t at = (hole + 1) & mask_; slots_[at].node != kNoNode; at = (at + 1) & mask_) {
      // An entry may fill the hole unless its home lies behind the hole on the way to `at`.
      const std::size_t home = slots_[at].hash & mask_;
      if (((at - home) & mask_) >= ((at - hole) & mask_)) {
        slots_[hole] = slots_[at];
        hole = at;
      }
    }
    slots_[hole] = {};
    --size_;
  }

 private:
  struct Slot {
    std::uint32_t hash = 0;
    NodeIndex node = kNoNode;
  };

  std::size_t slot_of(std::uint32_t hash, NodeIndex node) const {
    std::size_t at = hash & mask_;
    while (slots_[at].node != node) at = (at + 1) & mask_;
    return at;
  }

  std::vector<Slot> slots_;
  std::size_t mask_;
  std::size_t size_ = 0;
};

}  // namespace engine::cache
