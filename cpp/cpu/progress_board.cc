#include "cpu/progress_board.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>

#include "engine/error.h"

namespace engine::cpu {
namespace {

struct Layout {
  std::atomic<uint64_t> num_ops;
  std::atomic<int32_t> fault_signal;
  std::atomic<int32_t> fault_is_outside;
};
static_assert(sizeof(Layout) == 16 && std::atomic<uint64_t>::is_always_lock_free);

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

// What a signal handler may look at: signals belong to the process.
Layout* noted_layout = nullptr;
struct sigaction previous[std::size(kSignals)];

void note(int number, siginfo_t* info, void*) {
  const bool is_sent = info->si_code <= 0;  // by kill() and its kin; faults of our own are positive
  noted_layout->fault_is_outside.store(is_sent && info->si_pid != getpid());
  noted_layout->fault_signal.store(number);
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    if (kSignals[i] == number) sigaction(number, &previous[i], nullptr);
  }
  // A fault happens again when this returns; what was sent has to be sent again.
  if (is_sent) raise(number);
}

}  // namespace

ProgressBoard::ProgressBoard(int fd) {
  struct stat status;
  if (fstat(fd, &status) != 0 || status.st_size < static_cast<int64_t>(sizeof(Layout))) {
    throw Error(ErrorCode::kInvalidArgument,
                "fd: expected a file of at least " + std::to_string(sizeof(Layout)) + " bytes for the board");
  }
  void* const page = mmap(nullptr, sizeof(Layout), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page == MAP_FAILED) {
    throw Error(ErrorCode::kUnsupported, std::string("fd: cannot map the board: ") + std::strerror(errno));
  }
  num_ops_ = &static_cast<Layout*>(page)->num_ops;
}

void ProgressBoard::note_faults() const {
  if (noted_layout != nullptr) throw Error(ErrorCode::kInvalidArgument, "faults are noted already");
  noted_layout = reinterpret_cast<Layout*>(num_ops_);
  struct sigaction action{};
  action.sa_sigaction = note;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);
}

}  // namespace engine::cpu
