// Runs the blocks of a kernel one after another on the CPU, each of its threads as a fiber.
//
// A fiber runs until it reaches a barrier or an exchange within its warp, and a warp until all its lanes are at a
// barrier of the block: what one thread reads from another without a barrier between is, in ascending or in descending
// order, not written yet.
// Shared memory is filled with NaN before each block and has a canary behind the bytes that the launch asked for.
//
// Refused with an error, where the GPU would hang or give anything: a barrier that some threads never reach, lanes
// of a warp in different exchanges, blocks of incomplete warps, launches beyond the limits of compute capability 9.0.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// A kernel's `extern __shared__ unsigned char dynamic_shared[]` is this array.
constexpr size_t kSharedLimit = 227 * 1024, kSharedCanary = 1024;
alignas(1024) inline unsigned char emulated_shared[kSharedLimit + kSharedCanary];

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xff;  // as float, half or bfloat16 a NaN, as an index far outside

enum class Order { kAscending, kDescending };
inline Order order = Order::kAscending;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  int line = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  char* stack = nullptr;
  bool started = false, finished = false;
  Barrier* waits_for = nullptr;
  uint64_t generation = 0;
  unsigned exchanges = 0;
  uint3 index;
};

struct Slot {
  unsigned char bytes[32];
};

struct Warp {
  Barrier barrier;
  Slot slots[2][kWarp];  // alternate, so that one barrier an exchange is enough
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::string failure;
inline uint64_t steps = 0;  // fibers resumed
inline const std::function<void()>* body = nullptr;

[[noreturn]] inline void to_scheduler() { _longjmp(scheduler, 1); }

[[noreturn]] inline void fail(const std::string& reason) {
  if (failure.empty()) {
    failure = reason + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current->index.x) + ")";
  }
  current->finished = true;
  to_scheduler();
}

inline void wait(Barrier& barrier, int expected, int line, const char* what) {
  if (barrier.arrived > 0 && barrier.line != line) {
    fail(std::string(what) + ": threads meet from line " + std::to_string(barrier.line) + " and line " +
         std::to_string(line));
  }
  barrier.line = line;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->generation = barrier.generation;
  if (_setjmp(current->resume) == 0) to_scheduler();
}

inline int lane() { return current->index.x % kWarp; }
inline Warp& warp() { return warps[current->index.x / kWarp]; }

inline void sync_block(int line) { wait(block_barrier, static_cast<int>(fibers.size()), line, "__syncthreads"); }

inline void sync_warp(int line) { wait(warp().barrier, kWarp, line, "a warp's exchange"); }

// Each lane puts down a value and, when all have, sees the whole warp's until the exchange after the next.
template <typename T>
const Slot* exchange(unsigned mask, T value, int line) {
  static_assert(sizeof(T) <= sizeof(Slot));
  if (mask != 0xffffffffu) fail("only exchanges of whole warps are emulated");
  Slot* slots = warp().slots[current->exchanges++ % 2];
  memcpy(&slots[lane()], &value, sizeof(T));
  sync_warp(line);
  return slots;
}

template <typename T>
T read(const Slot& slot) {
  T value;
  memcpy(&value, &slot, sizeof(T));
  return value;
}

inline void enter() {
  (*body)();
  current->finished = true;
  to_scheduler();
}

inline void prepare(size_t threads) {
  fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) {
      // The page below each stack stays unmapped: a stack that overflows faults instead of writing elsewhere.
      const size_t page = 4096;
      void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
      mprotect(memory, page, PROT_NONE);
      fiber.stack = static_cast<char*>(memory) + page;
    }
    fiber.started = fiber.finished = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    fiber.index = {static_cast<unsigned>(i), 0, 0};
  }
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  block_barrier = Barrier{};
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline bool runnable(const Fiber& fiber) {
  return !fiber.finished && (!fiber.waits_for || fiber.waits_for->generation != fiber.generation);
}

// Runs a warp until all its lanes wait for the block or are done; returns how many are done now that were not.
inline size_t run_warp(size_t warp_index) {
  size_t finished = 0;
  for (bool progress = true; progress && failure.empty();) {
    progress = false;
    for (int i = 0; i < kWarp && failure.empty(); ++i) {
      Fiber& fiber = fibers[warp_index * kWarp + (order == Order::kAscending ? i : kWarp - 1 - i)];
      if (!runnable(fiber)) continue;
      fiber.waits_for = nullptr;
      resume(fiber);
      progress = true;
      steps += 1;
      finished += fiber.finished;
    }
  }
  return finished;
}

inline void run_block(size_t threads, size_t shared_bytes) {
  memset(emulated_shared, kPoison, shared_bytes + kSharedCanary);
  prepare(threads);
  for (size_t left = threads; left > 0 && failure.empty();) {
    const uint64_t before = steps;
    for (size_t i = 0; i < warps.size(); ++i) left -= run_warp(order == Order::kAscending ? i : warps.size() - 1 - i);
    if (steps == before && failure.empty()) {
      failure = "deadlock: a barrier waits for threads that have left or wait elsewhere (block " +
                std::to_string(blockIdx.x) + ")";
    }
  }
  for (size_t i = 0; i < kSharedCanary; ++i) {
    if (emulated_shared[shared_bytes + i] != kPoison && failure.empty()) {
      failure = "shared memory written " + std::to_string(i) + " bytes past the " + std::to_string(shared_bytes) +
                " that were asked for (block " + std::to_string(blockIdx.x) + ")";
    }
  }
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  failure.clear();
  for (uint64_t i = 0; i < grid.x && failure.empty(); ++i) {
    blockIdx = {static_cast<unsigned>(order == Order::kAscending ? i : grid.x - 1 - i), 0, 0};
    run_block(block.x, shared_bytes);
  }
  if (!failure.empty()) throw std::runtime_error("emulated kernel: " + failure);
}

}  // namespace emulator

#define __syncthreads() ::emulator::sync_block(__LINE__)
#define __syncwarp() ::emulator::sync_warp(__LINE__)
