// Memory that ops work in, one op at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>

#include "cpu/large_buffer.h"

namespace engine::cpu {

// Grows to the largest demand and stays: the steps of a model ask for the same sizes again and again.
class Scratch {
 public:
  // The memory is the holder's until it is gone.
  struct Hold {
    std::unique_lock<std::mutex> lock;
    char* data;
  };

  Hold take(int64_t num_bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (buffer_ == nullptr || buffer_->num_bytes() < num_bytes) {
      buffer_.reset();
      buffer_ = std::make_unique<LargeBuffer>(std::max<int64_t>(num_bytes, 4096));
    }
    return {std::move(lock), static_cast<char*>(buffer_->data())};
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<LargeBuffer> buffer_;
};

}  // namespace engine::cpu
