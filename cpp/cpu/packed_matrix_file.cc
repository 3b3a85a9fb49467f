// Packed weights to and from files.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>

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

// The same for pieces of the buffer on all threads.
template <typename Transfer>
bool transfer_pieces(ThreadPool& pool, const LargeBuffer& buffer, int64_t offset, const Transfer& transfer) {
  if (offset < 0 || offset > std::numeric_limits<int64_t>::max() - buffer.num_bytes()) return false;
  std::atomic<bool> is_complete{true};
  char* data = static_cast<char*>(buffer.data());
  pool.parallel_for((buffer.num_bytes() + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece;
    const int64_t size = std::min(end * kPiece, buffer.num_bytes()) - first;
    if (!transfer_all(data + first, size, offset + first, transfer)) is_complete.store(false);
  });
  return is_complete.load();
}

[[noreturn]] void refuse(const char* what) {
  throw Error(ErrorCode::kUnsupported, std::string("file: ") + what);
}

}  // namespace

void PackedMatrix::write_file(ThreadPool& pool, int fd, int64_t offset) const {
  const bool is_written = transfer_pieces(
      pool, *buffer_, offset, [fd](char* data, size_t size, int64_t at) { return pwrite(fd, data, size, at); });
  if (!is_written) refuse("the packed weights could not be written");
}

void PackedMatrix::read_file(ThreadPool& pool, int fd, int64_t offset) {
  expect_writable();
  const bool is_read = transfer_pieces(
      pool, *buffer_, offset, [fd](char* data, size_t size, int64_t at) { return pread(fd, data, size, at); });
  if (!is_read) refuse("it ends before the packed weights do");
  complete();
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
