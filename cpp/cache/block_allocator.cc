#include "cache/block_allocator.h"

#include <limits>
#include <string>

#include "engine/error.h"

namespace engine::cache {
namespace {

constexpr std::int32_t kMaxRefCount = std::numeric_limits<std::int32_t>::max();

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

}  // namespace

BlockAllocator::BlockAllocator(std::int64_t num_blocks) {
  constexpr std::int64_t kMost = std::numeric_limits<BlockId>::max();
  if (num_blocks < 0 || num_blocks > kMost) {
    refuse("num_blocks: expected 0 to " + std::to_string(kMost) + ", got " + std::to_string(num_blocks));
  }
  ref_counts_.assign(static_cast<std::size_t>(num_blocks), 0);
  free_.reserve(ref_counts_.size());
  for (std::int64_t id = num_blocks - 1; id >= 0; --id) free_.push_back(static_cast<BlockId>(id));
}

std::optional<std::vector<BlockId>> BlockAllocator::try_allocate(std::int64_t count) {
  if (count < 0) refuse("count: expected at least 0, got " + std::to_string(count));
  if (count > num_free()) return std::nullopt;
  std::vector<BlockId> block_ids(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - block_ids.size());
  for (BlockId id : block_ids) ref_counts_[id] = 1;
  return block_ids;
}

void BlockAllocator::retain(std::span<const BlockId> block_ids) {
  for (std::size_t i = 0; i < block_ids.size(); ++i) {
    const BlockId id = block_ids[i];
    if (is_allocated(id) && ref_counts_[id] < kMaxRefCount) {
      ++ref_counts_[id];
      continue;
    }
    for (std::size_t done = 0; done < i; ++done) --ref_counts_[block_ids[done]];
    if (!in_range(id))
      refuse("retain: no block " + std::to_string(id) + " among " + std::to_string(num_blocks()));
    refuse("retain: block " + std::to_string(id) +
           (is_allocated(id) ? " has too many references" : " is free"));
  }
}

void BlockAllocator::release(std::span<const BlockId> block_ids) {
  // From the last to the first, so that the first is handed out again first.
  for (std::size_t i = block_ids.size(); i-- > 0;) {
    const BlockId id = block_ids[i];
    if (is_allocated(id)) {
      if (--ref_counts_[id] == 0) free_.push_back(id);
      continue;
    }
    for (std::size_t done = i + 1; done < block_ids.size(); ++done) {
      if (ref_counts_[block_ids[done]]++ == 0) free_.pop_back();
    }
    if (!in_range(id))
      refuse("release: no block " + std::to_string(id) + " among " + std::to_string(num_blocks()));
    refuse("release: block " + std::to_string(id) +
           " is free already, or released more often than it was held");
  }
}

std::int32_t BlockAllocator::ref_count(BlockId block_id) const {
  if (!in_range(block_id)) {
    refuse("block_id: no block " + std::to_string(block_id) + " among " + std::to_string(num_blocks()));
  }
  return ref_counts_[block_id];
}

void BlockAllocator::check() const {
  const auto broken = [](BlockId id, const char* what) {
    throw Error(ErrorCode::kInternal, "block allocator: block " + std::to_string(id) + what);
  };
  std::vector<bool> is_free(ref_counts_.size(), false);
  for (BlockId id : free_) {
    if (!in_range(id)) broken(id, " is on the free list but does not exist");
    if (is_free[id]) broken(id, " is on the free list twice");
    if (ref_counts_[id] != 0) broken(id, " is on the free list but has references");
    is_free[id] = true;
  }
  for (BlockId id = 0; id < num_blocks(); ++id) {
    if (ref_counts_[id] < 0) broken(id, " has a negative reference count");
    if (ref_counts_[id] == 0 && !is_free[id]) broken(id, " is lost: no references and not on the free list");
  }
}

}  // namespace engine::cache
