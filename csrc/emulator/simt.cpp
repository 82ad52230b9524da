// Implements simt.h: fibers, the scheduler, and the warp-wide instructions.
#include "../cuda/params.h"
#include "simt.h"

#include <algorithm>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

// Saves the callee's registers on the current stack, its address in *from, and continues on the stack `to`.
extern "C" void flamingo_switch_stack(void** from, void* to);
asm(R"(
.globl flamingo_switch_stack
flamingo_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace flamingo {
namespace simt {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr long kMostPasses = 2000000;  // of the scheduler in a block, before the block counts as hung
Failure pending_failure;
bool failed = false;

void fiber_main() {
  machine.kernel();
  machine.fiber().done = true;
  machine.yield();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
  fiber.stack.resize(kStackBytes);
  // The first switch pops six registers and returns into fiber_main, with the stack as after a call.
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.data() + kStackBytes) & ~15ull;
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(fiber_main);
  frame[7] = nullptr;
  fiber.stack_pointer = frame;
  fiber.done = fiber.at_barrier = false;
  fiber.groups.assign(1, {});
}

void land(const PendingCopy& copy) {
  if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
  else std::memset(copy.shared, 0, 16);
}

bool runnable(const Fiber& fiber) { return !fiber.done && !fiber.at_barrier; }

}  // namespace

// Exceptions cannot cross stacks, so the fiber keeps the reason and stops, and the scheduler throws.
void fail(const std::string& reason) {
  if (!failed) pending_failure.reason = reason;
  failed = true;
  for (;;) machine.yield();
}

void Machine::yield() {
  Fiber& self = fiber();
  flamingo_switch_stack(&self.stack_pointer, scheduler);
}

bool Machine::enabled(const char* kind, const char* file, int line) {
  for (size_t i = 0; i < sites.size(); ++i)
    if (sites[i].line == line && sites[i].file == file) return static_cast<int>(i) != skipped_site;
  sites.push_back({kind, file, line});
  return static_cast<int>(sites.size()) - 1 != skipped_site;
}

void Machine::run_block(int x, int y, int z) {
  block_x = x;
  block_y = y;
  block_z = z;
  warp_arrived.assign(threads / 32, 0);
  warp_generation.assign(threads / 32, 0);
  barrier_arrived = 0;
  std::memset(shared.data(), 0xff, shared.size());
  for (int t = 0; t < threads; ++t) prepare(fibers[t]);
  failed = false;
  long passes = 0;
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    for (int warp = 0; warp < threads / 32; ++warp)
      if (std::any_of(&fibers[warp * 32], &fibers[warp * 32] + 32, runnable)) ready.push_back(warp);
    if (ready.empty()) break;
    const int warp = ready[random() % ready.size()];
    for (uint32_t steps = 1 + random() % 64; steps > 0; --steps)
      for (int t = warp * 32; t < warp * 32 + 32; ++t)
        if (runnable(fibers[t])) {
          current = t;
          flamingo_switch_stack(&scheduler, fibers[t].stack_pointer);
          if (failed) throw pending_failure;
        }
    if (++passes > kMostPasses) throw Failure{"lanes of a warp wait for each other at different instructions"};
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) throw Failure{"a barrier that not all threads reach"};
}

void launch(const cuda::Grid& grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  machine.threads = threads;
  machine.kernel = kernel;
  machine.fibers.resize(threads);
  machine.shared.assign(shared_bytes + 128, 0);
  for (int z = 0; z < grid.splits; ++z)
    for (int y = 0; y < grid.heads; ++y)
      for (int x = 0; x < grid.blocks; ++x) machine.run_block(x, y, z);
}

}  // namespace simt

namespace cuda {

using simt::machine;

void copy_16_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    simt::fail("an asynchronous copy from or to an address that is no multiple of 16");
  const uintptr_t offset = static_cast<char*>(shared) - reinterpret_cast<char*>(shared_memory());
  if (offset + 16 > machine.shared.size() - 128) simt::fail("a copy beyond the end of shared memory");
  const simt::PendingCopy copy = {shared, global, valid};
  const bool now = machine.copies == simt::Copies::kAtOnce ||
                   (machine.copies == simt::Copies::kByChance && machine.random() % 2 == 0);
  if (now) simt::land(copy);
  else machine.fiber().groups.back().push_back(copy);
}

void commit_copies() { machine.fiber().groups.push_back({}); }

void wait_for_copies(int pending, const char* file, int line) {
  if (!machine.enabled("wait", file, line)) ++pending;  // one group too few
  auto& groups = machine.fiber().groups;
  const int finished = static_cast<int>(groups.size()) - 1 - pending;
  for (int i = 0; i < finished; ++i)
    for (const simt::PendingCopy& copy : groups[i]) simt::land(copy);
  if (finished > 0) groups.erase(groups.begin(), groups.begin() + finished);
}

void barrier(const char* file, int line) {
  if (!machine.enabled("barrier", file, line)) return;
  if (++machine.barrier_arrived == machine.threads) {
    machine.barrier_arrived = 0;
    for (simt::Fiber& fiber : machine.fibers) fiber.at_barrier = false;
  } else {
    machine.fiber().at_barrier = true;
    machine.yield();
  }
}

namespace {

void load_four_matrices(uint32_t (&r)[4], const uint16_t* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("ldmatrix from an address that is no multiple of 16");
  machine.fiber().exchange.row = row;
  simt::together([transposed](int first) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t halves[2];
        for (int i = 0; i < 2; ++i) {
          const int along = lane % 4 * 2 + i, across = lane / 4;
          const int source = matrix * 8 + (transposed ? along : across);
          halves[i] = machine.fibers[first + source].exchange.row[transposed ? across : along];
        }
        machine.fibers[first + lane].exchange.a[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
      }
  });
  std::memcpy(r, machine.fiber().exchange.a, sizeof(r));
}

template <class Choose>
int reduce(int x, Choose choose) {
  machine.fiber().exchange.integer = x;
  simt::together([choose](int first) {
    int result = machine.fibers[first].exchange.integer;
    for (int lane = 1; lane < 32; ++lane) result = choose(result, machine.fibers[first + lane].exchange.integer);
    for (int lane = 0; lane < 32; ++lane) machine.fibers[first + lane].exchange.integer = result;
  });
  return machine.fiber().exchange.integer;
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const uint16_t* row) { load_four_matrices(r, row, false); }
void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) { load_four_matrices(r, row, true); }

uint32_t exchange(uint32_t x, int mask) {
  machine.fiber().exchange.word = x;
  simt::together([mask](int first) {
    uint32_t words[32];
    for (int lane = 0; lane < 32; ++lane) words[lane] = machine.fibers[first + (lane ^ mask)].exchange.word;
    for (int lane = 0; lane < 32; ++lane) machine.fibers[first + lane].exchange.word = words[lane];
  });
  return machine.fiber().exchange.word;
}

int smallest_lane(int x) {
  return reduce(x, [](int a, int b) { return std::min(a, b); });
}
int largest_lane(int x) {
  return reduce(x, [](int a, int b) { return std::max(a, b); });
}

}  // namespace cuda
}  // namespace flamingo
