// Packed weights to and from files.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/packed_matrix.h"
#include "engine/error.h"

namespace engine::cpu {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;

// Calls transfer(data, size, offset), which is pread or pwrite, until all bytes are moved. False when it fails.
template <typename Transfer>
bool transfer_all(char* data, int64_t num_bytes, int64_t offset, const Transfer& transfer) {
  while (num_bytes > 0) {
    const ssize_t moved = transfer(data, static_cast<size_t>(num_bytes), offset);
    if (moved <= 0) return false;
    data += moved;
    num_bytes -= moved;
    offset += moved;
  }
  return true;
}

[[noreturn]] void refuse(const char* what) {
  throw Error(ErrorCode::kUnsupported, std::string("file: ") + what);
}

// One step of a sum. It can be undone, so one word that changes always changes the sum.
uint64_t add_word(uint64_t sum, uint64_t word) { return std::rotl(sum ^ word, 29) * 0x9fb21c651e98df25u; }

// Lanes of their own keep the multiplier busy.
uint64_t sum_of(const char* data, int64_t num_bytes) {
  constexpr int64_t kLanes = 8, kStep = kLanes * 8;
  uint64_t lanes[kLanes] = {}, words[kLanes] = {}, sum = 0;
  for (; num_bytes >= kStep; data += kStep, num_bytes -= kStep) {
    std::memcpy(words, data, kStep);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = add_word(lanes[i], words[i]);
  }
  for (const uint64_t lane : lanes) sum = add_word(sum, lane);
  for (; num_bytes > 0; ++data, --num_bytes) sum = add_word(sum, static_cast<unsigned char>(*data));
  return sum;
}

// The same for pieces of the buffer on all threads; the sum of all bytes. Throws `complaint` when it fails.
template <typename Transfer>
uint64_t transfer_pieces(ThreadPool& pool, const LargeBuffer& buffer, int64_t offset, const char* complaint,
                         const Transfer& transfer) {
  if (offset < 0 || offset > std::numeric_limits<int64_t>::max() - buffer.num_bytes()) refuse(complaint);
  std::atomic<bool> is_complete{true};
  char* data = static_cast<char*>(buffer.data());
  std::vector<uint64_t> sums(static_cast<size_t>((buffer.num_bytes() + kPiece - 1) / kPiece));
  pool.parallel_for(static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kPiece, size = std::min(kPiece, buffer.num_bytes() - first);
      if (!transfer_all(data + first, size, offset + first, transfer)) is_complete.store(false);
      sums[static_cast<size_t>(piece)] = sum_of(data + first, size);  // while it is in a cache
    }
  });
  if (!is_complete.load()) refuse(complaint);
  return std::accumulate(sums.begin(), sums.end(), uint64_t{0}, add_word);
}

}  // namespace

uint64_t PackedMatrix::write_file(ThreadPool& pool, int fd, int64_t offset) const {
  return transfer_pieces(pool, *buffer_, offset, "the packed weights could not be written",
                         [fd](char* data, size_t size, int64_t at) { return pwrite(fd, data, size, at); });
}

uint64_t PackedMatrix::read_file(ThreadPool& pool, int fd, int64_t offset) {
  expect_writable();
  const uint64_t sum =
      transfer_pieces(pool, *buffer_, offset, "it ends before the packed weights do",
                      [fd](char* data, size_t size, int64_t at) { return pread(fd, data, size, at); });
  complete();
  return sum;
}

void PackedMatrix::clear() {
  buffer_ = std::make_unique<LargeBuffer>(num_bytes(), LargeBuffer::Place::kBesideOthers);  // zeros
  column_scales_.clear();
  column_order_.clear();
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fill(is_packed_.begin(), is_packed_.end(), false);
  num_missing_ = out_features_;
}

void PackedMatrix::map_file(int fd, int64_t offset) {
  struct stat status;
  if (fstat(fd, &status) != 0 || offset < 0 || offset > status.st_size - num_bytes()) {
    refuse("it ends before the packed weights do");  // touching what is missing would kill the process
  }
  buffer_ = std::make_unique<LargeBuffer>(fd, offset, num_bytes());
  complete();
}

void PackedMatrix::set_column_scales(std::vector<float> scales) {
  if (!scales.empty() && (!is_quantized(format_) || static_cast<int64_t>(scales.size()) != in_features_)) {
    throw Error(ErrorCode::kInvalidArgument,
                "column_scales: expected one for each of K=" + std::to_string(in_features_) +
                    " columns of a quantised matrix");
  }
  column_scales_ = std::move(scales);
}

void PackedMatrix::complete() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fill(is_packed_.begin(), is_packed_.end(), true);
  num_missing_ = 0;
}

}  // namespace engine::cpu
