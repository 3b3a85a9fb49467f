// The integrity check of the radix tree: every invariant that radix_tree.h states.
#include <string>
#include <vector>

#include "cache/radix_tree.h"
#include "engine/error.h"

namespace engine::cache {
namespace {

void expect(bool holds, const char* invariant, std::uint32_t index) {
  if (holds) return;
  throw Error(ErrorCode::kInternal, "radix tree: node " + std::to_string(index) + ": " + invariant);
}

}  // namespace

void RadixTree::check() const {
  std::vector<std::uint32_t> num_children(num_indices_, 0);
  std::vector<std::uint32_t> child_locks(num_indices_, 0);
  std::vector<bool> is_free(num_indices_, false);
  std::vector<bool> is_seen(is_stored_.size(), false);
  for (NodeIndex i = first_free_; i != kNoNode; i = node(i).older) {
    expect(!is_free[i], "is on the list of free nodes twice", i);
    expect(node(i).num_blocks() == 0 && !node(i).is_root(), "is free but in use", i);
    is_free[i] = true;
  }
  std::size_t num_nodes = 0, num_roots = 0;
  std::int64_t num_cached = 0, num_evictable = 0;
  for (NodeIndex i = 1; i < num_indices_; ++i) {
    const Node& n = node(i);
    if (is_free[i]) continue;
    check_node(i);
    if (n.is_root()) {
      ++num_roots;
      continue;
    }
    expect(!is_free[n.parent], "its parent is free", i);
    ++num_nodes;
    ++num_children[n.parent];
    child_locks[n.parent] += n.path_locks;
    num_cached += static_cast<std::int64_t>(n.num_blocks());
    if (n.path_locks == 0) num_evictable += static_cast<std::int64_t>(n.num_blocks());
    for (BlockId id : n.block_ids) {
      expect(allocator_.is_allocated(id), "holds a block that is not allocated", i);
      expect(is_stored_[id] != 0, "holds a block that is not marked as stored", i);
      expect(!is_seen[id], "holds a block that another place holds too", i);
      is_seen[id] = true;
    }
  }
  for (NodeIndex i = 1; i < num_indices_; ++i) {
    if (is_free[i]) continue;
    expect(node(i).num_children == num_children[i], "wrong number of children", i);
    if (node(i).is_root()) continue;
    expect(node(i).path_locks == node(i).own_locks + child_locks[i], "locks are not its own and its children's",
           i);
  }
  for (std::size_t id = 0; id < is_stored_.size(); ++id) {
    expect((is_stored_[id] != 0) == is_seen[id], "(none) a block is marked as stored but in no node", kNoNode);
  }
  expect(num_nodes == children_.size(), "(all) wrong number of nodes among the children", kNoNode);
  expect(num_roots == roots_.size(), "(all) wrong number of namespaces", kNoNode);
  expect(num_cached == num_cached_blocks_, "(all) wrong number of cached blocks", kNoNode);
  expect(num_evictable == num_evictable_blocks_, "(all) wrong number of evictable blocks", kNoNode);
  check_list();
}

void RadixTree::check_node(NodeIndex index) const {
  const Node& n = node(index);
  if (n.is_root()) {
    const auto entry = roots_.find(*n.name);
    expect(entry != roots_.end() && entry->second == index, "its namespace leads elsewhere", index);
    expect(&entry->first == n.name, "its name is not that of its namespace", index);
    expect(n.num_children > 0, "is a root without children", index);
    expect(n.num_blocks() == 0 && n.own_locks == 0, "is a root with blocks or locks", index);
    return;
  }
  expect(n.num_blocks() > 0, "has no blocks", index);
  expect(n.tokens.size() == n.num_blocks() * block_size_, "tokens and blocks differ in number", index);
  expect(n.parent != kNoNode && n.parent < num_indices_ && n.parent != index, "has no parent", index);
  // Runs are not empty, so starts grow along a path: this also excludes cycles.
  expect(n.start == node(n.parent).end(), "does not start where its parent ends", index);
  expect(n.hash == child_hash(n.parent, n.tokens.data()), "wrong hash", index);
  expect(find_child(n.parent, n.tokens.data()) == index,
         "is not found, or a sibling begins with the same block", index);
}

void RadixTree::check_list() const {
  std::vector<bool> is_listed(num_indices_, false);
  NodeIndex newer = kNoNode;
  for (NodeIndex i = node(kNoNode).older; i != kNoNode; newer = i, i = node(i).older) {
    const Node& n = node(i);
    expect(!is_listed[i], "is on the eviction list twice", i);
    expect(n.num_blocks() > 0 && n.path_locks == 0, "is on the eviction list but not evictable", i);
    expect(n.newer == newer, "its neighbour on the eviction list disagrees", i);
    const Node& parent = node(n.parent);
    expect(parent.is_root() || parent.path_locks > 0 || is_listed[n.parent],
           "would be evicted after its parent", i);
    is_listed[i] = true;
  }
  expect(node(kNoNode).newer == newer, "the eviction list does not end here", newer);
  for (NodeIndex i = 1; i < num_indices_; ++i) {
    if (node(i).num_blocks() == 0) continue;
    expect(is_listed[i] == (node(i).path_locks == 0), "is evictable but not on the eviction list", i);
  }
}

}  // namespace engine::cache
