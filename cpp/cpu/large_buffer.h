// Zeroed memory for weights and caches, in huge pages where the system allows it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engine::cpu {

// Reading gigabytes through 4 KiB pages costs a quarter of the bandwidth in address translation.
// Aligned to 64 bytes at least. Pages count against the process only once they are written.
class LargeBuffer {
 public:
  // Throws kUnsupported when the system refuses the memory.
  explicit LargeBuffer(int64_t num_bytes);
  // The bytes of a file from `offset`, a multiple of the page size, on; read only, paged in when touched.
  LargeBuffer(int fd, int64_t offset, int64_t num_bytes);
  ~LargeBuffer();
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;

  void* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  bool is_writable() const { return is_writable_; }

 private:
  int64_t num_bytes_;
  bool is_writable_;
  void* mapping_;
  size_t mapping_bytes_;
  void* data_;
};

}  // namespace engine::cpu
