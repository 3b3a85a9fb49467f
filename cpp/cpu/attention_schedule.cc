#include "cpu/attention_schedule.h"

#include <algorithm>
#include <cstring>

namespace engine::cpu {
namespace {

constexpr int32_t split_of(int64_t token) { return static_cast<int32_t>(token / kAttentionSplit); }

// Adds the units of `num_pairs` pairs, tile by tile; `unit` has the rest.
void add_tiles(std::vector<AttentionUnit>& units, AttentionUnit unit, int64_t num_pairs) {
  for (int64_t pair = 0; pair < num_pairs; pair += kAttentionTilePairs) {
    unit.first_pair = static_cast<int32_t>(pair);
    unit.num_pairs = static_cast<int32_t>(std::min(kAttentionTilePairs, num_pairs - pair));
    units.push_back(unit);
  }
}

// Adds pieces of a unit's splits.
void add_pieces(std::vector<AttentionUnit>& units, AttentionUnit unit, int64_t num_pieces) {
  const int32_t end = unit.end_split;
  const int64_t num_splits = end - unit.first_split;
  const auto length = static_cast<int32_t>((num_splits + num_pieces - 1) / num_pieces);
  while (unit.first_split < end) {
    unit.end_split = std::min(unit.first_split + length, end);
    units.push_back(unit);
    unit.first_split = unit.end_split;
  }
}

}  // namespace

void AttentionSchedule::build(const PagedAttentionArgs& args, int num_threads) {
  args_ = args;
  partial_units_.clear();
  joining_units_.clear();
  rows_.clear();
  order_sequences();
  for (Sequence& sequence : sequences_) add_rows(sequence);
  share(0, num_small_, 0);
  if (const int64_t num_pieces = pieces_of(partial_units_, num_threads); num_pieces > 1) {
    pieces_.clear();
    for (const AttentionUnit& unit : partial_units_) add_pieces(pieces_, unit, num_pieces);
    partial_units_.swap(pieces_);
  }
  for (const Sequence& sequence : sequences_) finish(sequence);
  if (const int64_t num_pieces = pieces_of(joining_units_, num_threads); num_pieces > 1) {
    cut_joining_units(num_pieces);
  }
  place_partials();
}

const int32_t* AttentionSchedule::block_table(const Sequence& sequence) const {
  return args_.block_tables + sequence.index * args_.block_tables_stride;
}

int64_t AttentionSchedule::num_shareable_blocks(const Sequence& sequence) const {
  return (sequence.num_shareable * kAttentionSplit + args_.S - 1) / args_.S;
}

int64_t AttentionSchedule::count_equal_blocks(const Sequence& left, const Sequence& right) const {
  constexpr int64_t kStride = 16;  // ids that are compared at once
  const int32_t *a = block_table(left), *b = block_table(right);
  const int64_t count = std::min(num_shareable_blocks(left), num_shareable_blocks(right));
  int64_t i = 0;
  while (i + kStride <= count && std::memcmp(a + i, b + i, kStride * sizeof(*a)) == 0) i += kStride;
  while (i < count && a[i] == b[i]) ++i;
  return i;
}

// By the ids of the blocks, so that neighbours share the most.
bool AttentionSchedule::comes_before(const Sequence& left, const Sequence& right) const {
  const int64_t equal = count_equal_blocks(left, right);
  const int64_t left_count = num_shareable_blocks(left), right_count = num_shareable_blocks(right);
  if (equal == left_count || equal == right_count) return left_count < right_count;
  return block_table(left)[equal] < block_table(right)[equal];
}

void AttentionSchedule::order_sequences() {
  sequences_.clear();
  const int64_t heads_per_group = args_.H / args_.G;
  const auto is_small = [&](const Sequence& sequence) {
    return sequence.num_rows * heads_per_group < kAttentionTilePairs;
  };
  for (int32_t b = 0; b < args_.B; ++b) {
    Sequence sequence{};
    sequence.index = b;
    sequence.num_rows = args_.cu_seqlens_q[b + 1] - args_.cu_seqlens_q[b];
    if (sequence.num_rows == 0) continue;
    if (is_small(sequence)) sequence.num_shareable = split_of(args_.kv_lens[b]);
    sequences_.push_back(sequence);
  }
  const auto small_end = std::stable_partition(sequences_.begin(), sequences_.end(), is_small);
  num_small_ = static_cast<size_t>(small_end - sequences_.begin());
  std::sort(sequences_.begin(), small_end,
            [&](const Sequence& left, const Sequence& right) { return comes_before(left, right); });
  for (size_t i = 1; i < num_small_; ++i) {
    const int64_t num_tokens = count_equal_blocks(sequences_[i - 1], sequences_[i]) * args_.S;
    const int32_t most = std::min(sequences_[i - 1].num_shareable, sequences_[i].num_shareable);
    sequences_[i].num_shared = std::min(split_of(num_tokens), most);
  }
}

void AttentionSchedule::add_rows(Sequence& sequence) {
  sequence.first_row = static_cast<int32_t>(rows_.size());
  const int64_t kv_len = args_.kv_lens[sequence.index], window = args_.window;
  for (int32_t i = 0; i < sequence.num_rows; ++i) {
    const int64_t position = kv_len - sequence.num_rows + i;
    int64_t newest = position;
    if (!args_.is_causal) newest = window > 0 ? std::min(position + window, kv_len) - 1 : kv_len - 1;
    AttentionRow row{};
    row.row = args_.cu_seqlens_q[sequence.index] + i;
    row.position = static_cast<int32_t>(position);
    row.newest = static_cast<int32_t>(newest);
    row.first_split = window > 0 ? split_of(std::max<int64_t>(position - window + 1, 0)) : 0;
    rows_.push_back(row);
  }
}

// Common tiles for the sequences [first, last), of whose splits the first `num_done` are cared for: for the
// next ones that a run of neighbours shares, and then for those that some of the run share further on.
void AttentionSchedule::share(size_t first, size_t last, int32_t num_done) {
  while (first < last) {
    size_t end = first + 1;
    int32_t num_shared = sequences_[first].num_shareable;
    for (; end < last && sequences_[end].num_shared > num_done; ++end) {
      num_shared = std::min(num_shared, sequences_[end].num_shared);
    }
    if (end - first > 1) {
      const int32_t first_row = sequences_[first].first_row;
      const int32_t end_row = sequences_[end - 1].first_row + sequences_[end - 1].num_rows;
      AttentionUnit unit{};
      unit.is_partial = true;
      unit.first_row = first_row;
      unit.sequence = sequences_[first].index;
      unit.end_split = num_shared;
      unit.first_split = num_shared;
      for (int32_t i = first_row; i < end_row; ++i) {
        AttentionRow& row = rows_[static_cast<size_t>(i)];
        unit.first_split = std::min(unit.first_split, std::max(row.first_split, num_done));
        row.num_partials = std::max(num_shared - row.first_split, 0);
      }
      if (unit.first_split < unit.end_split) {
        add_tiles(partial_units_, unit, (end_row - first_row) * (args_.H / args_.G));
      }
      for (size_t i = first; i < end; ++i) sequences_[i].num_done = num_shared;
      share(first, end, num_shared);
    }
    first = end;
  }
}

// The splits of a sequence that are not shared.
void AttentionSchedule::finish(const Sequence& sequence) {
  const int64_t heads_per_group = args_.H / args_.G;
  const size_t first_unit = joining_units_.size();
  AttentionUnit whole{};
  whole.first_row = sequence.first_row;
  whole.sequence = sequence.index;
  add_tiles(joining_units_, whole, sequence.num_rows * heads_per_group);
  for (size_t i = first_unit; i < joining_units_.size(); ++i) {
    AttentionUnit& unit = joining_units_[i];
    const auto row_of = [&](int64_t pair) -> const AttentionRow& {
      return rows_[static_cast<size_t>(unit.first_row + pair / heads_per_group)];
    };
    unit.first_split = std::max(row_of(unit.first_pair).first_split, sequence.num_done);
    const int64_t last_pair = unit.first_pair + unit.num_pairs - 1;
    unit.end_split = std::max(split_of(row_of(last_pair).newest) + 1, unit.first_split);
  }
}

// Into how many pieces the walks of units are cut, so that all threads have about the same to do.
int64_t AttentionSchedule::pieces_of(const std::vector<AttentionUnit>& units, int num_threads) const {
  const int64_t num_items = static_cast<int64_t>(units.size()) * args_.G;
  if (num_items == 0 || num_items % num_threads == 0 || num_items >= 2 * num_threads) return 1;
  return (2 * num_threads + num_items - 1) / num_items;
}

// Leaves nothing but joining to the joining units.
void AttentionSchedule::cut_joining_units(int64_t num_pieces) {
  const auto is_long = [](const AttentionUnit& unit) { return unit.end_split - unit.first_split > 1; };
  if (std::none_of(joining_units_.begin(), joining_units_.end(), is_long)) return;
  for (AttentionUnit& unit : joining_units_) {
    AttentionUnit walk = unit;
    walk.is_partial = true;
    add_pieces(partial_units_, walk, num_pieces);
    unit.first_split = unit.end_split;
  }
  for (AttentionRow& row : rows_) row.num_partials = split_of(row.newest) + 1 - row.first_split;
}

void AttentionSchedule::place_partials() {
  num_partial_floats_ = 0;
  for (AttentionRow& row : rows_) {
    row.partials = num_partial_floats_;
    num_partial_floats_ += row.num_partials * args_.H * partial_floats(args_.D);
  }
}

}  // namespace engine::cpu
