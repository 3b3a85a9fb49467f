#include "cpu/large_buffer.h"

#include <sys/mman.h>

#include <string>

#include "engine/error.h"

namespace engine::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

// A large mapping has room to start at the boundary of a huge page.
LargeBuffer::LargeBuffer(int64_t num_bytes) : num_bytes_(num_bytes), is_writable_(true) {
  const size_t size = static_cast<size_t>(num_bytes);
  const bool is_large = size >= kHugePage;
  mapping_bytes_ = is_large ? size + kHugePage : size;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    throw Error(ErrorCode::kUnsupported, "memory: the system refused " + std::to_string(num_bytes) + " bytes");
  }
  data_ = mapping_;
  if (is_large) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
    data_ = reinterpret_cast<void*>((start + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
    madvise(data_, size, MADV_HUGEPAGE);  // only advice: without it everything works, slower
#endif
  }
}

LargeBuffer::LargeBuffer(int fd, int64_t offset, int64_t num_bytes)
    : num_bytes_(num_bytes), is_writable_(false), mapping_bytes_(static_cast<size_t>(num_bytes)) {
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ, MAP_SHARED, fd, offset);
  if (mapping_ == MAP_FAILED) throw Error(ErrorCode::kUnsupported, "file: the system refused to map it");
  data_ = mapping_;
}

LargeBuffer::~LargeBuffer() { munmap(mapping_, mapping_bytes_); }

}  // namespace engine::cpu
