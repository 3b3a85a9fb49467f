#include "cpu/large_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "engine/error.h"

namespace engine::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kCacheLine = 64;
// Addresses, not memory, that neighbours are cut from.
constexpr size_t kSharedBytes = size_t{64} << 20;

char* round_up(void* start, size_t alignment) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  return reinterpret_cast<char*>((address + alignment - 1) / alignment * alignment);
}

// Where a mapping starts, or null.
std::shared_ptr<void> map(size_t num_bytes, int protection, int flags, int fd, int64_t offset) {
  void* start = mmap(nullptr, num_bytes, protection, flags, fd, offset);
  if (start == MAP_FAILED) return nullptr;
  return {start, [num_bytes](void* mapped) { munmap(mapped, num_bytes); }};
}

// Of huge pages, beginning with one.
std::shared_ptr<void> map_memory(size_t num_bytes) {
  // A large mapping has room to start at the boundary of a huge page.
  const bool is_large = num_bytes >= kHugePage;
  auto mapping = map(is_large ? num_bytes + kHugePage : num_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == nullptr) {
    throw Error(ErrorCode::kUnsupported, "memory: the system refused " + std::to_string(num_bytes) + " bytes");
  }
  if (!is_large) return mapping;
  char* data = round_up(mapping.get(), kHugePage);
#if defined(MADV_HUGEPAGE)
  madvise(data, num_bytes, MADV_HUGEPAGE);  // only advice: without it everything works, slower
#endif
  return {mapping, data};
}

// Cuts buffers from one mapping until it is full. Like malloc's, its memory is the process'.
class Neighbours {
 public:
  std::shared_ptr<void> take(size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<void> mapping = mapping_.lock();
    if (mapping == nullptr || num_bytes > num_left_) {
      if (num_bytes > kSharedBytes / 2) return map_memory(num_bytes);
      mapping = map_memory(kSharedBytes);
      mapping_ = mapping;
      num_left_ = kSharedBytes;
    }
    char* data = static_cast<char*>(mapping.get()) + (kSharedBytes - num_left_);
    num_left_ -= std::min(num_left_, (num_bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
    return {mapping, data};
  }

 private:
  std::mutex mutex_;
  std::weak_ptr<void> mapping_;
  size_t num_left_ = 0;
};

std::shared_ptr<void> memory_for(size_t num_bytes, LargeBuffer::Place place) {
  static Neighbours neighbours;
  return place == LargeBuffer::Place::kAlone ? map_memory(num_bytes) : neighbours.take(num_bytes);
}

}  // namespace

LargeBuffer::LargeBuffer(int64_t num_bytes, Place place)
    : num_bytes_(num_bytes),
      is_writable_(true),
      mapping_(memory_for(static_cast<size_t>(num_bytes), place)),
      data_(mapping_.get()) {}

LargeBuffer::LargeBuffer(int fd, int64_t offset, int64_t num_bytes)
    : num_bytes_(num_bytes),
      is_writable_(false),
      mapping_(map(static_cast<size_t>(num_bytes), PROT_READ, MAP_SHARED, fd, offset)),
      data_(mapping_.get()) {
  if (mapping_ == nullptr) throw Error(ErrorCode::kUnsupported, "file: the system refused to map it");
}

}  // namespace engine::cpu
