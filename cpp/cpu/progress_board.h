// The native side of the page that the engine's supervisor watches; core/step_board.py has its layout.
#pragma once

#include <atomic>
#include <cstdint>

namespace engine::cpu {

// A mapping of the page. It stays mapped until the process ends: a signal handler may still write to it.
class ProgressBoard {
 public:
  // Throws kUnsupported when the file cannot be mapped. The descriptor stays the caller's.
  explicit ProgressBoard(int fd);

  std::atomic<uint64_t>& num_ops() const { return *num_ops_; }

  // From now on a deadly signal (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT) is noted on the board, with
  // whether another process sent it, before the handler that was there before sees it. Once a process.
  void note_faults() const;

 private:
  std::atomic<uint64_t>* num_ops_;
};

}  // namespace engine::cpu
