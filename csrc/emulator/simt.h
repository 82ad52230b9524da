// Runs the CUDA kernels of this project on a CPU, for tests. It defines the names of cuda/ptx.cuh, with one fiber for
// each thread.
//
// Warps run in random order and are interrupted at random points. Shared memory starts as NaN. An asynchronous copy
// lands at once, as late as the wait for it allows, or either by chance. So does a product of a warpgroup, which reads
// only copies that were published. A kernel that relies on an order which the hardware does not promise then computes
// something else. For mutation tests every barrier, wait and fence can be switched off by its place in the source. The
// emulator shows neither speed, bank conflicts and occupancy, nor reorderings of memory accesses within a warp.
#pragma once
#include <stdint.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define FLAMINGO_DEVICE inline
#define FLAMINGO_KERNEL(threads, blocks) void
#define FLAMINGO_ASSERT(condition) \
  if (!(condition)) flamingo::simt::fail("device assertion: " #condition)
#define FLAMINGO_CHECK(condition) FLAMINGO_ASSERT(condition)

namespace flamingo {
namespace simt {

enum class Copies : int { kAtOnce, kAsLateAsAllowed, kByChance };

struct Failure {
  std::string reason;
};
[[noreturn]] void fail(const std::string& reason);

struct PendingCopy {
  void* shared;
  const void* global;
  bool valid;
};

// Input and output of a lane at a warp-wide instruction.
struct Exchange {
  const uint16_t* row;
  uint32_t a[4], b[2];
  float c[4];
  uint32_t word;
  int integer;
};

// A product that a warpgroup computes, as the instruction describes it.
struct GroupProduct {
  bool left_in_registers, left_transposed, right_transposed;
  uint32_t a[4];         // the left operand, if it is in registers
  uint64_t left, right;  // tiles in shared memory
  float (*unpack)(uint16_t);
  size_t result;  // its number
};

struct GroupResult {
  std::vector<float*> registers;  // NaN until the wait
  std::vector<float> values;      // what they will hold
};

// The products of a thread between two waits.
struct Group {
  bool started = false;
  std::vector<GroupResult> results;
  std::vector<GroupProduct> products;
  size_t computed = 0, committed = 0;
};

struct Written {
  size_t at, bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  bool done = false, at_barrier = false;
  std::vector<std::vector<PendingCopy>> groups;  // committed groups, then the open one
  Exchange exchange;
  std::vector<Written> unpublished;  // what no product can read yet
  Group group;
};

struct Site {
  const char* kind;
  std::string file;
  int line;
};

constexpr size_t kSharedAlignment = 1024;

struct Machine {
  Copies copies = Copies::kAtOnce;
  uint64_t random_state = 1;
  int skipped_site = -1;  // index into sites
  std::vector<Site> sites;

  int threads = 0, current = 0, block_x = 0, block_y = 0, block_z = 0;
  std::vector<Fiber> fibers;
  std::vector<int> warp_arrived, warp_generation;
  int barrier_arrived = 0;
  std::vector<char> shared;
  std::vector<char> published;  // shared memory as products of a warpgroup read it
  std::vector<int> warp_products;  // how many products each warp has issued
  std::function<void()> kernel;
  void* scheduler = nullptr;

  Fiber& fiber() { return fibers[current]; }
  uint32_t random() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_state >> 33);
  }
  // Whether the barrier or wait at this place takes part; places are numbered in the order of their first use.
  bool enabled(const char* kind, const char* file, int line);
  void yield();
  void run_block(int x, int y, int z);
};

extern Machine machine;

// The last lane of a warp to arrive does the work of all; `work` gets the warp's first thread.
template <class Work>
void together(Work work) {
  const int warp = machine.current / 32, generation = machine.warp_generation[warp];
  if (++machine.warp_arrived[warp] == 32) {
    machine.warp_arrived[warp] = 0;
    ++machine.warp_generation[warp];
    work(warp * 32);
  } else {
    while (machine.warp_generation[warp] == generation) machine.yield();
  }
}

void launch(const cuda::Grid& grid, int threads, int shared_bytes, const std::function<void()>& kernel);

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

}  // namespace simt

namespace cuda {

inline int thread_number() { return simt::machine.current; }
inline int block_x() { return simt::machine.block_x; }
inline int block_y() { return simt::machine.block_y; }
inline int block_z() { return simt::machine.block_z; }
inline uint16_t* shared_memory() {
  const uintptr_t mask = simt::kSharedAlignment - 1;
  return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(simt::machine.shared.data()) + mask) & ~mask);
}
inline size_t shared_bytes() { return simt::machine.shared.size() - simt::kSharedAlignment; }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - reinterpret_cast<const char*>(shared_memory()));
}

void store_word(uint16_t* shared, uint32_t word);
void note_store(size_t at, size_t bytes);  // to shared memory
void copy_16_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending, const char* file, int line);
template <int pending>
void wait_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  wait_for_copies(pending, file, line);
}
void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE());

void load_matrices(uint32_t (&r)[4], const uint16_t* row);
void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row);

template <Type kType>
float unpack(uint16_t x) {
  if (kType == Type::kBFloat16) return simt::bits_to_float(static_cast<uint32_t>(x) << 16);
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}

template <Type kType>
uint16_t round_to_16_bits(float x) {
  if (kType == Type::kBFloat16) {
    const uint32_t bits = simt::float_to_bits(x);
    return std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <Type kType>
uint32_t pack(float low, float high) {
  return round_to_16_bits<kType>(low) | static_cast<uint32_t>(round_to_16_bits<kType>(high)) << 16;
}

// Lane l of a warp holds, with g = l / 4 and t = 2 (l % 4): of A the rows g and g + 8 at columns t and t + 8, of B
// the column g at rows t and t + 8, of C the rows g and g + 8 at columns t, two neighbors each.
template <Type kType>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::Exchange& mine = simt::machine.fiber().exchange;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.c, c, sizeof(c));
  mine.b[0] = b0;
  mine.b[1] = b1;
  simt::together([](int first) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const simt::Exchange& x = simt::machine.fibers[first + lane].exchange;
      for (int i = 0; i < 2; ++i) {
        const int g = lane / 4, t = lane % 4 * 2 + i;
        const auto half = [i](uint32_t word) { return unpack<kType>(static_cast<uint16_t>(word >> (16 * i))); };
        left[g][t] = half(x.a[0]);
        left[g + 8][t] = half(x.a[1]);
        left[g][t + 8] = half(x.a[2]);
        left[g + 8][t + 8] = half(x.a[3]);
        right[t][g] = half(x.b[0]);
        right[t + 8][g] = half(x.b[1]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* sums = simt::machine.fibers[first + lane].exchange.c;
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) sums[i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
    }
  });
  std::memcpy(c, mine.c, sizeof(c));
}

void publish(const char* file, int line);
inline void publish_writes(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
#if defined(FLAMINGO_WARPGROUPS)
  publish(file, line);
#endif
}
void start_products(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void commit_products(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void finish_products(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void issue_product(float* const* registers, int count, const simt::GroupProduct& product);

template <Type kType, int kColumns>
void issue_product(float (&c)[kColumns][4], simt::GroupProduct product) {
  float* registers[kColumns * 4];
  for (int i = 0; i < kColumns * 4; ++i) registers[i] = &c[i / 4][i % 4];
  product.unpack = unpack<kType>;
  issue_product(registers, kColumns * 4, product);
}
template <Type kType>
void multiply_group(float (&c)[8][4], uint64_t a, uint64_t b) {
  issue_product<kType>(c, {false, false, false, {}, a, b});
}
template <Type kType, int kColumns>
void multiply_group_transposed(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b) {
  issue_product<kType>(c, {false, true, true, {}, a, b});
}
template <Type kType, int kColumns>
void multiply_group(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  issue_product<kType>(c, {true, false, true, {a[0], a[1], a[2], a[3]}, 0, b});
}

uint32_t exchange(uint32_t x, int mask);
inline float exchange(float x, int mask) { return simt::bits_to_float(exchange(simt::float_to_bits(x), mask)); }
int smallest_lane(int x);
int largest_lane(int x);
inline bool any_lane(bool x) { return largest_lane(x) != 0; }

inline float power_of_two(float x) { return std::exp2(x); }
inline float natural_log(float x) { return std::log(x); }
inline int forget(int x) { return x; }
inline void lower_to(int* p, int x) { *p = *p < x ? *p : x; }
inline void raise_to(int* p, int x) { *p = *p > x ? *p : x; }

template <class Params>
int launch(void (*kernel)(Params), const Grid& grid, int threads, int shared_bytes, const Params& p, void*) {
  simt::launch(grid, threads, shared_bytes, [kernel, p] { kernel(p); });
  return 0;
}

}  // namespace cuda
}  // namespace flamingo
