#include "cache/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "engine/error.h"

namespace engine::cache {
namespace {

constexpr std::int64_t kMaxBlockSize = 1 << 20;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }

std::size_t checked_block_size(std::int64_t block_size) {
  if (block_size < 1 || block_size > kMaxBlockSize) {
    refuse("block_size: expected 1 to " + std::to_string(kMaxBlockSize) + ", got " +
           std::to_string(block_size));
  }
  return static_cast<std::size_t>(block_size);
}

template <class T>
std::vector<T> copy_of(std::span<const T> values) {
  return std::vector<T>(values.begin(), values.end());
}

// Shortens to `size`, and gives memory back when most of it would lie idle. O(1) amortised.
template <class T>
void truncate(std::vector<T>& values, std::size_t size) {
  values.resize(size);
  if (values.capacity() > 4 * size) values.shrink_to_fit();
}

}  // namespace

RadixTree::RadixTree(BlockAllocator& allocator, std::int64_t block_size, std::uint32_t hash_mask)
    : allocator_(allocator),
      block_size_(checked_block_size(block_size)),
      hash_key_(HashKey::random()),
      hash_mask_(hash_mask),
      children_(static_cast<std::size_t>(allocator.num_blocks())),
      roots_(0, NameHash{hash_key_}),
      is_stored_(static_cast<std::size_t>(allocator.num_blocks()), 0) {
  new_node();  // the sentinel
}

// --- lookup --------------------------------------------------------------------------------------

Match RadixTree::match(std::string_view name_space, std::span<const Token> tokens) {
  Match match;
  match.block_ids.reserve(tokens.size() / block_size_);
  Walk at = walk(name_space, tokens, [&](const Node& n, std::size_t count) {
    match.block_ids.insert(match.block_ids.end(), n.block_ids.begin(), n.block_ids.begin() + count);
  });
  ++stats_.num_lookups;
  if (at.num_blocks == 0) return match;
  ++stats_.num_hits;
  if (at.num_blocks < node(at.node).end()) at.node = split(at.node, at.num_blocks - node(at.node).start);
  touch_path(at.node);
  match.node = handle_of(at.node);
  return match;
}

std::int64_t RadixTree::match_length(std::string_view name_space, std::span<const Token> tokens) const {
  const Walk at = walk(name_space, tokens, [](const Node&, std::size_t) {});
  return static_cast<std::int64_t>(at.num_blocks * block_size_);
}

// Follows `tokens` from the root; calls visit(node, matching blocks of its run) for each node.
template <class Visit>
RadixTree::Walk RadixTree::walk(std::string_view name_space, std::span<const Token> tokens,
                                Visit&& visit) const {
  Walk at{find_root(name_space), 0};
  if (at.node == kNoNode) return at;
  const std::size_t num_blocks = tokens.size() / block_size_;
  while (at.num_blocks < num_blocks) {
    const Token* rest = tokens.data() + at.num_blocks * block_size_;
    const NodeIndex child = find_child(at.node, rest);
    if (child == kNoNode) break;
    const Node& n = node(child);
    const std::size_t most = std::min(n.num_blocks(), num_blocks - at.num_blocks);
    const std::size_t count = count_equal_blocks(n.tokens.data(), rest, most);
    visit(n, count);
    at = {child, at.num_blocks + count};
    if (count < n.num_blocks()) break;
  }
  return at;
}

NodeIndex RadixTree::find_root(std::string_view name_space) const {
  const auto found = roots_.find(name_space);
  return found == roots_.end() ? kNoNode : found->second;
}

NodeIndex RadixTree::find_child(NodeIndex parent, const Token* first_block) const {
  return children_.find(child_hash(parent, first_block), [&](NodeIndex index) {
    const Node& n = node(index);
    return n.parent == parent && std::memcmp(n.tokens.data(), first_block, block_size_ * sizeof(Token)) == 0;
  });
}

std::uint32_t RadixTree::child_hash(NodeIndex parent, const Token* first_block) const {
  const std::uint64_t block = hash_bytes(first_block, block_size_ * sizeof(Token), hash_key_);
  return static_cast<std::uint32_t>(fold(block ^ hash_key_.second, parent ^ hash_key_.first)) & hash_mask_;
}

std::size_t RadixTree::count_equal_blocks(const Token* a, const Token* b, std::size_t most) const {
  // Strides of several blocks keep memcmp in its vector loop; the last stride is searched by block.
  constexpr std::size_t kStride = 16;
  const auto equal = [&](std::size_t begin, std::size_t count) {
    const std::size_t offset = begin * block_size_;
    return std::memcmp(a + offset, b + offset, count * block_size_ * sizeof(Token)) == 0;
  };
  std::size_t count = 0;
  while (count + kStride <= most && equal(count, kStride)) count += kStride;
  while (count < most && equal(count, 1)) ++count;
  return count;
}

// --- insertion -----------------------------------------------------------------------------------

Insertion RadixTree::insert(std::string_view name_space, std::span<const Token> tokens,
                            std::span<const BlockId> block_ids, NodeHandle held) {
  if (tokens.size() != block_ids.size() * block_size_) {
    refuse("token_ids: expected " + std::to_string(block_ids.size()) + " blocks of " +
           std::to_string(block_size_) + ", got " + std::to_string(tokens.size()) + " tokens");
  }
  const NodeIndex held_index = held == kEmptyPath ? kNoNode : resolve(held);
  Insertion result;
  result.block_ids.reserve(block_ids.size());
  Walk at = walk(name_space, tokens, [&](const Node& n, std::size_t count) {
    result.block_ids.insert(result.block_ids.end(), n.block_ids.begin(), n.block_ids.begin() + count);
  });
  check_insertable(block_ids, result.block_ids);
  if (block_ids.empty()) return result;

  // Nothing is refused from here on.
  for (std::size_t i = 0; i < at.num_blocks; ++i) result.num_duplicates += block_ids[i] != result.block_ids[i];
  stats_.num_duplicate_blocks += result.num_duplicates;
  if (at.node == kNoNode) at.node = add_root(name_space);
  if (at.num_blocks < node(at.node).end()) at.node = split(at.node, at.num_blocks - node(at.node).start);
  if (at.num_blocks < block_ids.size()) {
    const auto new_tokens = tokens.subspan(at.num_blocks * block_size_);
    const auto new_blocks = block_ids.subspan(at.num_blocks);
    const Node& last = node(at.node);
    const std::uint32_t allowed_locks = at.node == held_index ? 1 : 0;
    if (!last.is_root() && last.num_children == 0 && last.path_locks <= allowed_locks) {
      append(at.node, new_tokens, new_blocks);
    } else {
      at.node = add_child(at.node, new_tokens, new_blocks);
    }
    result.block_ids.insert(result.block_ids.end(), new_blocks.begin(), new_blocks.end());
  }
  touch_path(at.node);
  result.node = handle_of(at.node);
  return result;
}

// A block that is not at its own place already must be allocated, not in the tree, and given once.
void RadixTree::check_insertable(std::span<const BlockId> block_ids, std::span<const BlockId> canonical) {
  const auto is_in_place = [&](std::size_t i) { return i < canonical.size() && block_ids[i] == canonical[i]; };
  const char* problem = nullptr;
  std::size_t num_seen = 0;
  for (; num_seen < block_ids.size() && problem == nullptr; ++num_seen) {
    const BlockId id = block_ids[num_seen];
    if (is_in_place(num_seen)) continue;
    if (!allocator_.is_allocated(id)) {
      problem = " is not allocated";
    } else if (is_stored_[id]) {
      problem = " is in the tree already, or given twice";
    } else {
      is_stored_[id] = 1;  // until this check ends: finds repetitions
    }
  }
  if (problem != nullptr) --num_seen;
  for (std::size_t i = 0; i < num_seen; ++i) {
    if (!is_in_place(i)) is_stored_[block_ids[i]] = 0;
  }
  if (problem != nullptr) refuse("block_ids: block " + std::to_string(block_ids[num_seen]) + problem);
}

NodeIndex RadixTree::add_root(std::string_view name_space) {
  const NodeIndex index = new_node();
  const auto [entry, is_new] = roots_.emplace(name_space, index);
  node(index).name = &entry->first;
  return index;
}

NodeIndex RadixTree::add_child(NodeIndex parent, std::span<const Token> tokens,
                               std::span<const BlockId> block_ids) {
  const NodeIndex index = new_node();
  Node& n = node(index);
  n.parent = parent;
  n.start = static_cast<std::uint32_t>(node(parent).end());
  n.hash = child_hash(parent, tokens.data());
  children_.insert(n.hash, index);
  ++node(parent).num_children;
  link_newest(index);
  append(index, tokens, block_ids);
  return index;
}

void RadixTree::append(NodeIndex index, std::span<const Token> tokens, std::span<const BlockId> block_ids) {
  Node& n = node(index);
  allocator_.retain(block_ids);
  n.tokens.insert(n.tokens.end(), tokens.begin(), tokens.end());
  n.block_ids.insert(n.block_ids.end(), block_ids.begin(), block_ids.end());
  for (BlockId id : block_ids) is_stored_[id] = 1;
  const auto count = static_cast<std::int64_t>(block_ids.size());
  num_cached_blocks_ += count;
  if (n.path_locks == 0) num_evictable_blocks_ += count;
  stats_.num_inserted_blocks += count;
}

// Gives the first blocks of a run to a new node above, which is about to be used; returns it. The
// lower part keeps its index, its handles, its locks and its age.
NodeIndex RadixTree::split(NodeIndex index, std::size_t num_upper_blocks) {
  const NodeIndex upper_index = new_node();
  Node& lower = node(index);
  Node& upper = node(upper_index);
  const std::size_t num_upper_tokens = num_upper_blocks * block_size_;
  const std::span<const Token> tokens(lower.tokens);
  const std::span<const BlockId> block_ids(lower.block_ids);

  upper.parent = lower.parent;
  upper.start = lower.start;
  upper.hash = lower.hash;
  upper.num_children = 1;
  upper.path_locks = lower.path_locks;
  upper.tokens = copy_of(tokens.first(num_upper_tokens));
  upper.block_ids = copy_of(block_ids.first(num_upper_blocks));
  children_.replace(lower.hash, index, upper_index);

  lower.tokens = copy_of(tokens.subspan(num_upper_tokens));
  lower.block_ids = copy_of(block_ids.subspan(num_upper_blocks));
  lower.parent = upper_index;
  lower.start += static_cast<std::uint32_t>(num_upper_blocks);
  lower.hash = child_hash(upper_index, lower.tokens.data());
  children_.insert(lower.hash, index);
  if (lower.path_locks == 0) link_newest(upper_index);
  return upper_index;
}

// --- locks ---------------------------------------------------------------------------------------

void RadixTree::lock(NodeHandle handle) {
  if (handle == kEmptyPath) return;
  NodeIndex index = resolve(handle);
  if (node(index).own_locks == std::numeric_limits<std::uint32_t>::max())
    refuse("lock: the node has too many locks");
  ++node(index).own_locks;
  for (; !node(index).is_root(); index = node(index).parent) {
    if (node(index).path_locks++ > 0) continue;
    unlink(index);
    num_evictable_blocks_ -= static_cast<std::int64_t>(node(index).num_blocks());
  }
}

void RadixTree::unlock(NodeHandle handle) {
  if (handle == kEmptyPath) return;
  NodeIndex index = resolve(handle);
  if (node(index).own_locks == 0) refuse("unlock: the node is not locked");
  --node(index).own_locks;
  for (; !node(index).is_root(); index = node(index).parent) {
    if (--node(index).path_locks > 0) continue;
    link_newest(index);
    num_evictable_blocks_ += static_cast<std::int64_t>(node(index).num_blocks());
  }
}

std::int64_t RadixTree::path_len(NodeHandle handle) const {
  return handle == kEmptyPath ? 0 : static_cast<std::int64_t>(node(resolve(handle)).end());
}

// --- eviction ------------------------------------------------------------------------------------

std::int64_t RadixTree::evict(std::int64_t num_blocks) {
  if (num_blocks < 0) refuse("num_blocks: expected at least 0, got " + std::to_string(num_blocks));
  std::int64_t num_left = std::min(num_blocks, num_evictable_blocks_);
  const std::int64_t num_evicted = num_left;
  while (num_left > 0) {
    const NodeIndex index = node(kNoNode).newer;
    Node& n = node(index);
    const std::size_t count = std::min(n.num_blocks(), static_cast<std::size_t>(num_left));
    const std::size_t num_kept = n.num_blocks() - count;
    const auto evicted = std::span<const BlockId>(n.block_ids).subspan(num_kept);
    allocator_.release(evicted);
    for (BlockId id : evicted) is_stored_[id] = 0;
    num_left -= static_cast<std::int64_t>(count);
    num_cached_blocks_ -= static_cast<std::int64_t>(count);
    num_evictable_blocks_ -= static_cast<std::int64_t>(count);
    stats_.num_evicted_blocks += static_cast<std::int64_t>(count);
    if (num_kept == 0) {
      remove(index);
    } else {
      ++n.generation;  // the path that handles named is no more
      truncate(n.block_ids, num_kept);
      truncate(n.tokens, num_kept * block_size_);
    }
  }
  return num_evicted;
}

// Takes out an evictable leaf, and its root with the last child.
void RadixTree::remove(NodeIndex index) {
  const NodeIndex parent = node(index).parent;
  unlink(index);
  children_.erase(node(index).hash, index);
  free_node(index);
  if (--node(parent).num_children > 0 || !node(parent).is_root()) return;
  roots_.erase(roots_.find(*node(parent).name));
  free_node(parent);
}

// --- eviction list: a ring; behind the sentinel comes the newest, before it the oldest -----------

void RadixTree::touch_path(NodeIndex leaf) {
  // The nodes above a locked one are locked too, and on no list.
  for (NodeIndex i = leaf; !node(i).is_root() && node(i).path_locks == 0; i = node(i).parent) {
    unlink(i);
    link_newest(i);
  }
}

void RadixTree::link_newest(NodeIndex index) {
  Node& sentinel = node(kNoNode);
  node(index).newer = kNoNode;
  node(index).older = sentinel.older;
  node(sentinel.older).newer = index;
  sentinel.older = index;
}

void RadixTree::unlink(NodeIndex index) {
  const Node& n = node(index);
  node(n.newer).older = n.older;
  node(n.older).newer = n.newer;
}

// --- nodes ---------------------------------------------------------------------------------------

NodeIndex RadixTree::new_node() {
  if (first_free_ != kNoNode) {
    const NodeIndex index = first_free_;
    first_free_ = node(index).older;
    node(index).older = kNoNode;
    return index;
  }
  if (num_indices_ % kChunk == 0) chunks_.push_back(std::make_unique<Node[]>(kChunk));
  return num_indices_++;
}

void RadixTree::free_node(NodeIndex index) {
  Node fresh;
  fresh.generation = node(index).generation + 1;  // every handle to this index is stale now
  fresh.older = first_free_;
  node(index) = std::move(fresh);
  first_free_ = index;
}

NodeHandle RadixTree::handle_of(NodeIndex index) const {
  return index | (NodeHandle{node(index).generation} << 32);
}

NodeIndex RadixTree::resolve(NodeHandle handle) const {
  const auto index = static_cast<NodeIndex>(handle);
  const auto generation = static_cast<std::uint32_t>(handle >> 32);
  if (index < num_indices_ && node(index).generation == generation && node(index).num_blocks() > 0)
    return index;
  throw Error(ErrorCode::kStaleHandle,
              "node: handle " + std::to_string(handle) + " names no node: it was evicted, or never was");
}

}  // namespace engine::cache
