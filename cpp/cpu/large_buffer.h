// Zeroed memory for weights and caches, in huge pages where the system allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace engine::cpu {

// Reading gigabytes through 4 KiB pages costs a quarter of the bandwidth in address translation.
// Aligned to 64 bytes at least. Pages count against the process only once they are written.
class LargeBuffer {
 public:
  // Buffers that live and die together may lie side by side, so that small ones and the ends of others are in
  // huge pages, too, and what is read behind the end of one is the start of the next one that was made. Memory
  // goes back to the system when all neighbours are gone. A buffer of its own has huge pages from 2 MiB on.
  enum class Place { kAlone, kBesideOthers };

  // Throws kUnsupported when the system refuses the memory.
  explicit LargeBuffer(int64_t num_bytes, Place place = Place::kAlone);
  // The bytes of a file from `offset`, a multiple of the page size, on; read only, paged in when touched.
  LargeBuffer(int fd, int64_t offset, int64_t num_bytes);
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;

  void* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  bool is_writable() const { return is_writable_; }

 private:
  int64_t num_bytes_;
  bool is_writable_;
  std::shared_ptr<void> mapping_;
  void* data_;
};

}  // namespace engine::cpu
