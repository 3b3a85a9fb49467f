// Random walks of the radix tree against a map from token sequences to blocks, for sanitizers.
//
// The order of eviction and the Python side are tested in tests/property; here the point is that
// no walk, wrong calls included, touches memory that it should not.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cache/block_allocator.h"
#include "cache/radix_tree.h"
#include "engine/error.h"

namespace {

using namespace engine::cache;

#define EXPECT(condition)                                                                            \
  do {                                                                                               \
    if (!(condition)) {                                                                              \
      std::fprintf(stderr, "%s:%d: expected %s (seed %u)\n", __FILE__, __LINE__, #condition, seed_); \
      std::exit(1);                                                                                  \
    }                                                                                                \
  } while (false)

struct Shape {
  std::int64_t num_blocks;
  std::size_t block_size;
  std::size_t most_tokens;
  int vocab_size;
  std::uint32_t hash_mask;
  int num_steps;
  int check_every;
};

class Walker {
 public:
  Walker(const Shape& shape, unsigned seed)
      : shape_(shape),
        seed_(seed),
        random_(seed),
        allocator_(shape.num_blocks),
        tree_(allocator_, static_cast<std::int64_t>(shape.block_size), shape.hash_mask) {}

  void run() {
    for (int step = 0; step < shape_.num_steps; ++step) {
      take_step(below(100));
      if (step % shape_.check_every == 0) check();
    }
    while (!locked_.empty()) unlock();
    forget_evicted(tree_.clear());
    release_own(own_.size());
    check();
    EXPECT(allocator_.num_free() == allocator_.num_blocks());
    EXPECT(tree_.num_nodes() == 0 && tree_.num_namespaces() == 0);
  }

 private:
  using Path = std::pair<std::string, std::vector<Token>>;

  void take_step(std::size_t dice) {
    if (dice < 40) return insert();
    if (dice < 60) return match();
    if (dice < 70) return unlock();
    if (dice < 80) return evict(below(4));
    if (dice < 81) return evict(below(static_cast<std::size_t>(shape_.num_blocks)));
    if (dice < 90) return misuse();
    release_own(below(own_.size() + 1));
  }

  void insert() {
    Path path = random_path();
    const std::size_t num_blocks = path.second.size() / shape_.block_size;
    path.second.resize(num_blocks * shape_.block_size);
    make_room(num_blocks);
    const auto given = allocator_.try_allocate(static_cast<std::int64_t>(num_blocks));
    if (!given) return;
    const std::size_t num_known = longest(path);
    const NodeHandle held = locked_.empty() ? kEmptyPath : locked_[below(locked_.size())];
    const Insertion done = tree_.insert(path.first, path.second, *given, held);
    EXPECT(done.num_duplicates == static_cast<std::int64_t>(num_known));
    EXPECT(done.block_ids.size() == num_blocks);
    for (std::size_t i = 0; i < num_blocks; ++i) {
      const auto [entry, is_new] = blocks_.emplace(prefix(path, i + 1), (*given)[i]);
      EXPECT(is_new == (i >= num_known));
      EXPECT(done.block_ids[i] == entry->second);
    }
    own_.insert(own_.end(), given->begin(), given->end());
    if (below(2) == 0) lock(done.node);
    old_.push_back(done.node);
  }

  void match() {
    const Path path = random_path();
    const std::size_t num_known = longest(path);
    EXPECT(tree_.match_length(path.first, path.second) ==
           static_cast<std::int64_t>(num_known * shape_.block_size));
    const Match match = tree_.match(path.first, path.second);
    EXPECT(match.block_ids.size() == num_known);
    EXPECT(tree_.path_len(match.node) == static_cast<std::int64_t>(num_known));
    for (std::size_t i = 0; i < num_known; ++i) EXPECT(match.block_ids[i] == blocks_.at(prefix(path, i + 1)));
    if (below(3) == 0) lock(match.node);
  }

  void lock(NodeHandle handle) {
    if (handle == kEmptyPath || locked_.size() > 20) return;
    tree_.lock(handle);
    locked_.push_back(handle);
  }

  void unlock() {
    if (locked_.empty()) return;
    std::swap(locked_[below(locked_.size())], locked_.back());
    tree_.unlock(locked_.back());
    locked_.pop_back();
  }

  void evict(std::size_t num_blocks) {
    const auto count = static_cast<std::int64_t>(num_blocks);
    const std::int64_t expected = std::min(count, tree_.num_evictable_blocks());
    EXPECT(tree_.evict(count) == expected);
    forget_evicted(expected);
  }

  // What was evicted shows in what is found no more: prefixes longer than the match.
  void forget_evicted(std::int64_t num_evicted) {
    if (num_evicted == 0) return;
    std::erase_if(blocks_, [&](const auto& entry) {
      const auto& [name, tokens] = entry.first;
      return tree_.match_length(name, tokens) < static_cast<std::int64_t>(tokens.size()) && num_evicted-- > 0;
    });
    EXPECT(num_evicted == 0);
  }

  // Every one of these must be refused, or be harmless; check() sees whether anything changed.
  void misuse() {
    const std::int64_t num_cached = tree_.num_cached_blocks(), num_free = allocator_.num_free();
    const auto refused = [](auto&& call) {
      try {
        call();
      } catch (const engine::Error&) {
        return true;
      }
      return false;
    };
    const NodeHandle made_up = (NodeHandle{random_()} << 32) | below(64);
    const std::vector<Token> tokens(2 * shape_.block_size, 0);
    const std::vector<BlockId> outside = {0, static_cast<BlockId>(shape_.num_blocks)}, negative = {-1, 0};
    const std::vector<BlockId> twice(2, own_.empty() ? 0 : own_[below(own_.size())]);
    if (made_up >> 32 > 1u << 24) {
      EXPECT(refused([&] { tree_.lock(made_up); }));
      EXPECT(refused([&] { tree_.unlock(made_up); }));
      EXPECT(refused([&] { tree_.insert("x", tokens, twice, made_up); }));
    }
    EXPECT(refused([&] { tree_.insert("never", tokens, twice); }));
    EXPECT(refused([&] { tree_.insert("never", tokens, outside); }));
    EXPECT(refused([&] { tree_.insert("never", tokens, negative); }));
    EXPECT(refused([&] { allocator_.release(outside); }));
    EXPECT(refused([&] { allocator_.retain(negative); }));
    EXPECT(refused([&] { tree_.evict(-1); }));
    if (!old_.empty()) {  // may have gone stale
      const NodeHandle handle = old_[below(old_.size())];
      if (!refused([&] { tree_.lock(handle); })) tree_.unlock(handle);
    }
    EXPECT(tree_.num_cached_blocks() == num_cached && allocator_.num_free() == num_free);
  }

  void release_own(std::size_t count) {
    std::shuffle(own_.begin(), own_.end(), random_);
    allocator_.release(std::span<const BlockId>(own_).last(count));
    own_.resize(own_.size() - count);
  }

  void make_room(std::size_t num_blocks) {
    if (allocator_.num_free() >= static_cast<std::int64_t>(num_blocks)) return;
    release_own(own_.size());
    evict(num_blocks);
  }

  void check() {
    allocator_.check();
    tree_.check();
    EXPECT(tree_.num_cached_blocks() == static_cast<std::int64_t>(blocks_.size()));
    std::vector<std::int32_t> references(static_cast<std::size_t>(shape_.num_blocks), 0);
    for (BlockId id : own_) ++references[id];
    for (const auto& entry : blocks_) ++references[entry.second];
    for (BlockId id = 0; id < shape_.num_blocks; ++id) EXPECT(allocator_.ref_count(id) == references[id]);
  }

  std::size_t longest(const Path& path) const {
    std::size_t count = 0;
    while ((count + 1) * shape_.block_size <= path.second.size() && blocks_.contains(prefix(path, count + 1)))
      ++count;
    return count;
  }

  Path prefix(const Path& path, std::size_t num_blocks) const {
    return {path.first, {path.second.begin(), path.second.begin() + num_blocks * shape_.block_size}};
  }

  Path random_path() {
    Path path{std::string(below(3), 'n'), std::vector<Token>(below(shape_.most_tokens + 1))};
    for (Token& token : path.second) token = static_cast<Token>(below(shape_.vocab_size));
    return path;
  }

  std::size_t below(std::size_t count) { return count == 0 ? 0 : random_() % count; }

  Shape shape_;
  unsigned seed_;
  std::mt19937 random_;
  BlockAllocator allocator_;
  RadixTree tree_;
  std::map<Path, BlockId> blocks_;
  std::vector<BlockId> own_;
  std::vector<NodeHandle> locked_;
  std::vector<NodeHandle> old_;
};

}  // namespace

int main(int argc, char** argv) {
  const unsigned num_seeds = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 2;
  const Shape shapes[] = {
      {24, 1, 16, 2, ~0u, 2000, 1},     {24, 2, 20, 2, 0, 2000, 1},          {40, 3, 40, 2, 1, 2000, 1},
      {1, 1, 3, 1, ~0u, 500, 1},        {0, 1, 3, 1, ~0u, 100, 1},           {500, 2, 400, 2, 3, 1000, 50},
      {5000, 1, 1500, 1, ~0u, 500, 50}, {5000, 16, 2000, 2, ~0u, 1000, 100},
  };
  for (unsigned seed = 0; seed < num_seeds; ++seed) {
    for (const Shape& shape : shapes) Walker(shape, seed).run();
  }
  std::printf("radix tree: %u seeds passed\n", num_seeds);
}
