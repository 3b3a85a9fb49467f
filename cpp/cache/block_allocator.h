// Who owns which block of KV memory: reference counts and a free list.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace engine::cache {

using BlockId = std::int32_t;

// Hands out block ids and counts the references to them; what a block holds is not its business.
// The free list is a stack: the block that was freed last is handed out first, because its memory
// is the warmest. A new allocator hands out 0, 1, 2 and so on, and blocks that are released
// together come back in the order in which they were released.
//
// A wrong call throws Error and changes nothing. Not thread-safe: one scheduler owns it.
class BlockAllocator {
 public:
  explicit BlockAllocator(std::int64_t num_blocks);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(ref_counts_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }

  // `count` blocks with one reference each, or nothing when fewer are free.
  std::optional<std::vector<BlockId>> try_allocate(std::int64_t count);
  // Adds a reference to each block; each must be allocated.
  void retain(std::span<const BlockId> block_ids);
  // Drops a reference of each block; a block without references is free.
  void release(std::span<const BlockId> block_ids);

  std::int32_t ref_count(BlockId block_id) const;
  bool is_allocated(BlockId block_id) const { return in_range(block_id) && ref_counts_[block_id] > 0; }

  // Throws Error when the free list and the reference counts disagree. Cost: O(blocks).
  void check() const;

 private:
  bool in_range(BlockId block_id) const { return block_id >= 0 && block_id < num_blocks(); }

  std::vector<std::int32_t> ref_counts_;
  std::vector<BlockId> free_;  // a stack
};

}  // namespace engine::cache
