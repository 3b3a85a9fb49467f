// The prefix cache: which blocks already hold the keys and values of which tokens.
//
// Every path from a root spells a token sequence in whole blocks; there is one root for each
// namespace (adapter, salt), and a root lives as long as it has children. A node holds a run of
// blocks, so that a sequence which nobody branches off is one node. Two siblings never begin with
// the same block of tokens.
//
// Locks. Who uses a path locks the node at its end; all nodes from there to the root stay. A node
// that is under no lock is evictable, and so are then all nodes below it.
//
// Eviction order. Evictable nodes hang on an intrusive list, most recently used first. A use
// (match, insert, the last unlock) moves the nodes of the path to the front from leaf to root, so
// that every node comes before its descendants: the tail is always a leaf, and eviction takes
// O(1) a block. Within a run the last block goes first. Order and exactness are those of a list
// of single blocks.
//
// References. The tree holds one reference to each of its blocks. A wrong call throws Error and
// changes nothing. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cache/block_allocator.h"
#include "cache/child_table.h"
#include "cache/hash.h"

namespace engine::cache {

using Token = std::int32_t;

// Names the path that ends at a node: index | generation << 32. It stays good as long as all blocks
// of the path are in the tree: a split leaves it to the lower part, whose path is the same, and
// evicting the end of the run makes it stale. Only where a leaf grows in place does its handle
// name the longer path from then on. kEmptyPath names the path without blocks, which needs no lock.
using NodeHandle = std::uint64_t;
inline constexpr NodeHandle kEmptyPath = 0;

struct Match {
  NodeHandle node = kEmptyPath;
  std::vector<BlockId> block_ids;  // of the whole path
};

struct Insertion {
  NodeHandle node = kEmptyPath;
  std::int64_t num_duplicates = 0;
  std::vector<BlockId> block_ids;  // the tree's, of the whole path
};

struct TreeStats {
  std::int64_t num_lookups = 0;  // calls of match
  std::int64_t num_hits = 0;     // of these, with at least one block
  std::int64_t num_inserted_blocks = 0;
  std::int64_t num_duplicate_blocks = 0;
  std::int64_t num_evicted_blocks = 0;
};

class RadixTree {
 public:
  // The allocator must outlive the tree. Tests pass a small `hash_mask`, so that hashes collide.
  RadixTree(BlockAllocator& allocator, std::int64_t block_size, std::uint32_t hash_mask = ~0u);

  // The longest cached prefix of `tokens` in whole blocks. A use of its path. A run of which only
  // the first blocks match is split, so that the handle names exactly the match. The blocks may
  // be evicted until they are locked.
  Match match(std::string_view name_space, std::span<const Token> tokens);
  // Tokens that match() would find; changes nothing.
  std::int64_t match_length(std::string_view name_space, std::span<const Token> tokens) const;

  // Makes `block_ids` the blocks of `tokens`, except where the tree has blocks for these tokens
  // already: those stay, and given blocks that differ are duplicates. Retains each block that it
  // stores. A use of the path. A leaf under no lock, or only under the caller's one lock on `held`,
  // grows in place.
  Insertion insert(std::string_view name_space, std::span<const Token> tokens,
                   std::span<const BlockId> block_ids, NodeHandle held = kEmptyPath);

  void lock(NodeHandle node);
  void unlock(NodeHandle node);
  // Blocks of the path that ends at the node.
  std::int64_t path_len(NodeHandle node) const;

  // Evicts the least recently used blocks that are under no lock; returns how many.
  std::int64_t evict(std::int64_t num_blocks);
  std::int64_t clear() { return evict(num_evictable_blocks_); }

  std::int64_t block_size() const { return static_cast<std::int64_t>(block_size_); }
  std::int64_t num_cached_blocks() const { return num_cached_blocks_; }
  std::int64_t num_evictable_blocks() const { return num_evictable_blocks_; }
  std::int64_t num_nodes() const { return static_cast<std::int64_t>(children_.size()); }
  std::int64_t num_namespaces() const { return static_cast<std::int64_t>(roots_.size()); }
  const TreeStats& stats() const { return stats_; }

  // Throws Error naming the first broken invariant. Cost: O(blocks).
  void check() const;

 private:
  // Index 0 is the sentinel of the eviction list. A root has a name and no blocks.
  struct Node {
    NodeIndex parent = kNoNode;
    std::uint32_t hash = 0;  // of parent and first block: its place among the children
    std::vector<Token> tokens;
    std::vector<BlockId> block_ids;
    NodeIndex newer = kNoNode;  // neighbours in the eviction list
    NodeIndex older = kNoNode;  // also links the nodes that are free
    std::uint32_t start = 0;    // blocks of the path before this run
    std::uint32_t num_children = 0;
    std::uint32_t own_locks = 0;
    std::uint32_t path_locks = 0;  // own_locks + path_locks of all children
    std::uint32_t generation = 0;
    const std::string* name = nullptr;

    bool is_root() const { return name != nullptr; }
    std::size_t num_blocks() const { return block_ids.size(); }
    std::size_t end() const { return start + block_ids.size(); }
  };

  // Where a walk ended: `num_blocks` of the path matched, the last of them in `node`.
  struct Walk {
    NodeIndex node;
    std::size_t num_blocks;
  };

  struct NameHash {
    using is_transparent = void;
    HashKey key;
    std::size_t operator()(std::string_view name) const { return hash_bytes(name.data(), name.size(), key); }
  };

  Node& node(NodeIndex index) { return chunks_[index / kChunk][index % kChunk]; }
  const Node& node(NodeIndex index) const { return chunks_[index / kChunk][index % kChunk]; }
  NodeHandle handle_of(NodeIndex index) const;
  NodeIndex resolve(NodeHandle handle) const;

  template <class Visit>
  Walk walk(std::string_view name_space, std::span<const Token> tokens, Visit&& visit) const;
  NodeIndex find_root(std::string_view name_space) const;
  NodeIndex find_child(NodeIndex parent, const Token* first_block) const;
  std::uint32_t child_hash(NodeIndex parent, const Token* first_block) const;
  std::size_t count_equal_blocks(const Token* a, const Token* b, std::size_t most) const;

  void check_insertable(std::span<const BlockId> block_ids, std::span<const BlockId> canonical);
  NodeIndex add_root(std::string_view name_space);
  NodeIndex add_child(NodeIndex parent, std::span<const Token> tokens, std::span<const BlockId> block_ids);
  void append(NodeIndex index, std::span<const Token> tokens, std::span<const BlockId> block_ids);
  NodeIndex split(NodeIndex index, std::size_t num_upper_blocks);
  void remove(NodeIndex index);
  NodeIndex new_node();
  void free_node(NodeIndex index);

  void touch_path(NodeIndex leaf);
  void link_newest(NodeIndex index);
  void unlink(NodeIndex index);

  void check_node(NodeIndex index) const;
  void check_list() const;

  static constexpr std::size_t kChunk = 1024;

  BlockAllocator& allocator_;
  std::size_t block_size_;
  HashKey hash_key_;
  std::uint32_t hash_mask_;
  ChildTable children_;
  std::unordered_map<std::string, NodeIndex, NameHash, std::equal_to<>> roots_;
  std::vector<std::unique_ptr<Node[]>> chunks_;  // nodes never move
  NodeIndex num_indices_ = 0;                    // indices ever given out
  NodeIndex first_free_ = kNoNode;
  std::vector<std::uint8_t> is_stored_;  // by block id
  std::int64_t num_cached_blocks_ = 0;
  std::int64_t num_evictable_blocks_ = 0;
  TreeStats stats_;
};

}  // namespace engine::cache
