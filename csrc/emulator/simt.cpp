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
  fiber.unpublished.clear();
  fiber.group = {};
}

void land(const PendingCopy& copy) {
  if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
  else std::memset(copy.shared, 0, 16);
  cuda::note_store(cuda::shared_address(copy.shared), 16);
}

bool by_chance_now() {
  return machine.copies == Copies::kAtOnce || (machine.copies == Copies::kByChance && machine.random() % 2 == 0);
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
  warp_products.assign(threads / 32, 0);
  std::memset(shared.data(), 0xff, shared.size());
  std::memset(published.data(), 0xff, published.size());
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
  machine.shared.assign(shared_bytes + kSharedAlignment, 0);
  machine.published.assign(shared_bytes, 0);
  for (int z = 0; z < grid.splits; ++z)
    for (int y = 0; y < grid.heads; ++y)
      for (int x = 0; x < grid.blocks; ++x) machine.run_block(x, y, z);
}

}  // namespace simt

namespace cuda {

using simt::machine;

// A product that reads there gets NaN until the store is published.
void note_store(size_t at, size_t bytes) {
  std::memset(&machine.published[at], 0xff, bytes);
  machine.fiber().unpublished.push_back({at, bytes});
}

void store_word(uint16_t* shared, uint32_t word) {
  std::memcpy(shared, &word, 4);
  note_store(shared_address(shared), 4);
}

void copy_16_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    simt::fail("an asynchronous copy from or to an address that is no multiple of 16");
  if (shared_address(shared) + 16ull > shared_bytes()) simt::fail("a copy beyond the end of shared memory");
  const simt::PendingCopy copy = {shared, global, valid};
  if (simt::by_chance_now()) simt::land(copy);
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

void publish(const char* file, int line) {
  if (!machine.enabled("publication", file, line)) return;
  for (const simt::Written& written : machine.fiber().unpublished)
    std::memcpy(&machine.published[written.at], reinterpret_cast<char*>(shared_memory()) + written.at, written.bytes);
  machine.fiber().unpublished.clear();
}

void start_products(const char* file, int line) {
  if (machine.enabled("start of products", file, line)) machine.fiber().group.started = true;
}

void commit_products(const char* file, int line) {
  simt::Group& group = machine.fiber().group;
  group.started = false;
  if (machine.enabled("commit of products", file, line)) group.committed = group.products.size();
}

namespace {

// Reads an element of a tile that a descriptor locates: where `along` counts along the rows that are stored, and
// `across` counts these rows. The address of a 16-byte chunk is permuted by bits of itself.
uint16_t described_element(uint64_t tile, int across, int along) {
  const auto field = [tile](int bit) { return static_cast<uint32_t>(tile >> bit & 0x3fff) << 4; };
  if (tile >> 62 != 1 || (tile >> 49 & 7) != 0) simt::fail("a tile without the swizzle of 128 bytes");
  const uint32_t panel = along / 64, column = along % 64;
  uint32_t at = field(0) + panel * field(16) + across / 8 * field(32) + across % 8 * 128 + column * 2;
  at ^= (at >> 7 & 7) << 4;
  if (at + 2ull > machine.published.size()) simt::fail("a tile beyond the end of shared memory");
  uint16_t element;
  std::memcpy(&element, &machine.published[at], 2);
  return element;
}

// Computes the products of a warp up to number `end`. It has sixteen rows of the result.
void compute_products(int first, size_t end) {
  for (size_t number = machine.fibers[first].group.computed; number < end; ++number) {
    const simt::GroupProduct& product = machine.fibers[first].group.products[number];
    const int columns = static_cast<int>(machine.fibers[first].group.results[product.result].values.size()) * 2;
    float left[16][16], right[16][256];
    for (int lane = 0; lane < 32; ++lane) {
      const simt::GroupProduct& own = machine.fibers[first + lane].group.products[number];
      if (own.left != product.left || own.right != product.right) simt::fail("lanes of a warp multiply different tiles");
      for (int i = 0; i < 8 && product.left_in_registers; ++i)
        left[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] =
            product.unpack(static_cast<uint16_t>(own.a[i / 2] >> (16 * (i % 2))));
    }
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 16 && !product.left_in_registers; ++i) {
        const int row = first / 32 % 4 * 16 + i;
        left[i][k] = product.unpack(product.left_transposed ? described_element(product.left, k, row)
                                                            : described_element(product.left, row, k));
      }
      for (int n = 0; n < columns; ++n)
        right[k][n] = product.unpack(product.right_transposed ? described_element(product.right, k, n)
                                                              : described_element(product.right, n, k));
    }
    for (int lane = 0; lane < 32; ++lane) {
      simt::Group& group = machine.fibers[first + lane].group;
      std::vector<float>& values = group.results[product.result].values;
      for (size_t i = 0; i < values.size(); ++i)
        for (int k = 0; k < 16; ++k)
          values[i] += left[lane / 4 + i / 2 % 2 * 8][k] * right[k][i / 4 * 8 + lane % 4 * 2 + i % 2];
      ++group.computed;
    }
  }
}

}  // namespace

void issue_product(float* const* registers, int count, const simt::GroupProduct& product) {
  simt::Group& group = machine.fiber().group;
  if (!group.started) simt::fail("a product of a warpgroup that was not started");
  const std::vector<float*> all(registers, registers + count);
  size_t result = 0;
  while (result < group.results.size() && group.results[result].registers != all) ++result;
  if (result == group.results.size()) {
    group.results.push_back({all, {}});
    for (float* x : all) group.results[result].values.push_back(*x);
  }
  group.products.push_back(product);
  group.products.back().result = result;
  for (float* x : all) *x = simt::bits_to_float(0x7fffffff);
  simt::together([](int first) {
    ++machine.warp_products[first / 32];
    if (simt::by_chance_now()) compute_products(first, machine.fibers[first].group.products.size());
  });
}

// All four warps of a group have to issue a product before it ends.
void finish_products(const char* file, int line) {
  if (!machine.enabled("wait for products", file, line)) return;
  const int warp = machine.current / 32, mine = machine.warp_products[warp];
  for (int other = warp / 4 * 4; other < warp / 4 * 4 + 4; ++other)
    while (machine.warp_products[other] < mine) {
      const simt::Fiber* fibers = &machine.fibers[other * 32];
      if (std::none_of(fibers, fibers + 32, simt::runnable)) simt::fail("a product that not all warps of a group issue");
      machine.yield();
    }
  // Another warp may be far ahead before this one's rows are computed.
  if (machine.current % 32 == 0 && machine.random() % 4 == 0)
    for (int i = 0; i < 64; ++i) machine.yield();
  simt::together([](int first) { compute_products(first, machine.fibers[first].group.committed); });
  simt::Group& group = machine.fiber().group;
  if (group.committed < group.products.size()) return;
  for (const simt::GroupResult& result : group.results)
    for (size_t i = 0; i < result.values.size(); ++i) *result.registers[i] = result.values[i];
  group = {};
}

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
