#include "simt.h"

#include <csetjmp>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "engine/error.h"

namespace engine::simt {
namespace {

using cuda::kWarpLanes;

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

// Where lanes of one mask meet. The buffers alternate: a lane that runs ahead writes the other one, and meets
// the rest before it comes back to the first.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  uint64_t generation = 0;
  alignas(16) unsigned char given[2][kWarpLanes * kExchangeBytes];
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Place place;
  int index;
  bool is_started, is_done;
  std::jmp_buf environment;
  ucontext_t first_context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // ends in copies
};

// One block on its way. There is one at a time: launches are serial.
struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  int num_threads = 0, num_arrived = 0;
  uint64_t barrier = 0;
  std::vector<std::vector<std::unique_ptr<Meeting>>> warps;
  std::unique_ptr<unsigned char[]> shared;
  unsigned char* shared_begin = nullptr;
  std::jmp_buf scheduler;
  Thread* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr failure;
  bool has_progress = false, is_backwards = false;
  Counters counters;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

void enter() {
  Machine& m = machine();
  try {
    (*m.kernel)();
  } catch (...) {
    m.failure = std::current_exception();
  }
  m.current->is_done = true;
  _longjmp(m.scheduler, 1);
}

[[gnu::noinline]] void leave() {
  Machine& m = machine();
  if (_setjmp(m.current->environment) == 0) _longjmp(m.scheduler, 1);
}

[[gnu::noinline]] void resume(Thread& thread) {
  Machine& m = machine();
  m.current = &thread;
  if (_setjmp(m.scheduler) != 0) return;
  if (thread.is_started) _longjmp(thread.environment, 1);
  thread.is_started = true;
  m.has_progress = true;
  setcontext(&thread.first_context);
}

void wait_while(const uint64_t& generation, uint64_t value) {
  while (generation == value) leave();
  machine().has_progress = true;
}

void prepare(Thread& thread, int index, dim3 block) {
  const unsigned i = static_cast<unsigned>(index);
  thread.index = index;
  thread.place.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  thread.is_started = thread.is_done = false;
  thread.copies.clear();
  thread.groups.clear();
  getcontext(&thread.first_context);
  thread.first_context.uc_stack.ss_sp = thread.stack.get();
  thread.first_context.uc_stack.ss_size = kStackBytes;
  thread.first_context.uc_link = nullptr;
  makecontext(&thread.first_context, enter, 0);
}

void perform(const Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

void run_block(dim3 block, size_t shared_bytes) {
  Machine& m = machine();
  std::memset(m.shared_begin, kPoison, shared_bytes);
  std::memset(m.shared_begin + shared_bytes, kGuard, kGuardBytes);
  for (auto& warp : m.warps) {
    for (auto& meeting : warp) meeting->arrived = 0;
  }
  m.num_arrived = 0;
  for (int i = 0; i < m.num_threads; ++i) prepare(*m.threads[i], i, block);
  for (int num_done = 0; num_done < m.num_threads;) {
    m.has_progress = false;
    num_done = 0;
    for (int i = 0; i < m.num_threads; ++i) {
      Thread& thread = *m.threads[m.is_backwards ? m.num_threads - 1 - i : i];
      if (!thread.is_done) resume(thread);
      if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
      num_done += thread.is_done;
    }
    if (!m.has_progress && num_done < m.num_threads) fault("threads wait for others that never come");
  }
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (m.shared_begin[shared_bytes + i] != kGuard) fault("a thread wrote past the dynamic shared memory");
  }
  ++m.counters.blocks;
}

}  // namespace

void fault(const char* what) {
  const Machine& m = machine();
  const Place& at = m.current->place;
  char text[200];
  std::snprintf(text, sizeof(text), "%s: thread %d of block (%u, %u, %u)", what, m.current->index, at.block.x,
                at.block.y, at.block.z);
  throw Error(ErrorCode::kInternal, text);
}

const Place& place() { return machine().current->place; }
int lane_index() { return machine().current->index % kWarpLanes; }
unsigned char* shared_memory() { return machine().shared_begin; }
Counters& counters() { return machine().counters; }
void run_backwards(bool is_backwards) { machine().is_backwards = is_backwards; }

const unsigned char* exchange(unsigned mask, const void* value, size_t num_bytes) {
  Machine& m = machine();
  const int lane = lane_index();
  if (!(mask >> lane & 1)) fault("a lane takes part that the mask does not name");
  auto& meetings = m.warps[m.current->index / kWarpLanes];
  Meeting* meeting = nullptr;
  for (auto& known : meetings) {
    if (known->mask == mask) meeting = known.get();
  }
  if (meeting == nullptr) {
    meeting = meetings.emplace_back(std::make_unique<Meeting>()).get();
    meeting->mask = mask;
  }
  const uint64_t generation = meeting->generation;
  unsigned char* given = meeting->given[generation % 2];
  if (num_bytes > 0) std::memcpy(given + lane * kExchangeBytes, value, num_bytes);
  meeting->arrived |= 1u << lane;
  if (meeting->arrived == mask) {
    meeting->arrived = 0;
    ++meeting->generation;
    m.has_progress = true;
  } else {
    wait_while(meeting->generation, generation);
  }
  return given;
}

void sync_block() {
  Machine& m = machine();
  const uint64_t generation = m.barrier;
  if (++m.num_arrived == m.num_threads) {
    m.num_arrived = 0;
    ++m.barrier;
    m.has_progress = true;
  } else {
    wait_while(m.barrier, generation);
  }
}

void start_copy(void* shared, const void* global, bool is_wanted) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!is_aligned(shared) || !is_aligned(global)) fault("a copy is misaligned");
  machine().current->copies.push_back({shared, is_wanted ? global : nullptr});
}

void commit_copies() {
  Thread& thread = *machine().current;
  thread.groups.push_back(thread.copies.size());
}

void wait_copies(int num_pending) {
  Thread& thread = *machine().current;
  const size_t pending = static_cast<size_t>(num_pending);
  if (thread.groups.size() <= pending) return;
  const size_t num_finished = thread.groups.size() - pending, end = thread.groups[num_finished - 1];
  for (size_t i = 0; i < end; ++i) perform(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(end));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<std::ptrdiff_t>(num_finished));
  for (size_t& group : thread.groups) group -= end;
}

void note_matrix_rows(const unsigned char* addresses) {
  Counters& c = counters();
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned used = 0;
    for (int row = 0; row < 8; ++row) {
      const auto address = of_lane<uintptr_t>(addresses, 8 * matrix + row);
      const unsigned bank = 1u << (address / 16 % 8);
      c.matrix_conflicts += (used & bank) != 0;
      used |= bank;
      ++c.matrix_rows;
    }
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  const size_t num_threads = size_t{block.x} * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    throw Error(ErrorCode::kInternal, "a launch of no or too many threads or blocks");
  }
  m.num_threads = static_cast<int>(num_threads);
  while (m.threads.size() < num_threads) {
    m.threads.push_back(std::make_unique<Thread>());
    m.threads.back()->stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
  }
  m.warps.clear();
  m.warps.resize((num_threads + kWarpLanes - 1) / kWarpLanes);
  m.shared = std::make_unique_for_overwrite<unsigned char[]>(shared_bytes + kGuardBytes + 128);
  m.shared_begin = m.shared.get() + (128 - reinterpret_cast<uintptr_t>(m.shared.get()) % 128) % 128;
  m.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        for (size_t i = 0; i < num_threads; ++i) {
          m.threads[i]->place = {{0, 0, 0}, {x, y, z}, block, grid};
        }
        run_block(block, shared_bytes);
      }
    }
  }
}

}  // namespace engine::simt
