// Supports PTX that tests/ops/ptx_translation.py turned into C++: reinterpretations, checked addresses, and the entry
// point that launches a kernel by its number. Shared memory is addressed by offsets, as in PTX.
#pragma once
#include "../cuda/params.h"
#include "simt.h"

#include <cmath>
#include <cstring>
#include <string>

using namespace flamingo;
using namespace flamingo::cuda;

namespace {

inline float as_float(uint32_t bits) { return simt::bits_to_float(bits); }
inline uint32_t as_bits(float x) { return simt::float_to_bits(x); }

// Returns b with `length` bits of a in place of those from `position` on.
inline uint32_t insert_bits(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  const uint32_t mask = (length >= 32 ? ~0u : (1u << length) - 1) << position;
  return (b & ~mask) | ((a << position) & mask);
}

template <class T>
T* global_at(uint64_t address, int count = 1) {
  if (address % (sizeof(T) * count)) simt::fail("a misaligned access of global memory");
  return reinterpret_cast<T*>(address);
}

inline void* shared_at(uint32_t offset, uint32_t bytes) {
  const size_t size = shared_bytes();
  if (offset % bytes || offset + bytes > size)
    simt::fail("shared memory at " + std::to_string(offset) + " of " + std::to_string(size));
  return reinterpret_cast<char*>(shared_memory()) + offset;
}

inline uint32_t exchange_lanes(uint32_t x, uint32_t mask, uint32_t clamp, uint32_t members) {
  if (clamp != 31 || members != 0xffffffffu) simt::fail("an exchange among other lanes");
  return exchange(x, static_cast<int>(mask));
}

// Issues a product of a warpgroup whose left operand is in registers (four of them) or in shared memory. `transposed`:
// whether the right operand is.
template <Type kType, int kRegisters>
void multiply_group_of(float* const (&sums)[kRegisters], const uint32_t (&a)[4], uint64_t right, bool transposed) {
  issue_product(sums, kRegisters, {true, false, transposed, {a[0], a[1], a[2], a[3]}, 0, right, unpack<kType>});
}
template <Type kType, int kRegisters>
void multiply_group_of(float* const (&sums)[kRegisters], uint64_t left, uint64_t right, bool left_transposed,
                       bool transposed) {
  issue_product(sums, kRegisters, {false, left_transposed, transposed, {}, left, right, unpack<kType>});
}

inline void lower(uint64_t address, int32_t x) { lower_to(global_at<int>(address), x); }
inline void raise(uint64_t address, int32_t x) { raise_to(global_at<int>(address), x); }

typedef void (*Kernel)(const uint8_t* params);
struct NamedKernel {
  const char* name;
  Kernel kernel;
};
extern const NamedKernel kernels[];
char failure_text[512];

}  // namespace

extern "C" {

const char* ptx_kernel_name(int kernel) { return kernels[kernel].name; }
const char* ptx_failure() { return failure_text; }

void ptx_configure(uint64_t seed, int copies) {
  simt::machine.random_state = seed * 2654435761u + 1;
  simt::machine.copies = static_cast<simt::Copies>(copies);
}

int ptx_launch(int kernel, int blocks, int heads, int splits, int threads, int shared_bytes, const uint8_t* params) {
  try {
    simt::launch({blocks, heads, splits}, threads, shared_bytes, [=] { kernels[kernel].kernel(params); });
    return 0;
  } catch (const simt::Failure& failure) {
    std::snprintf(failure_text, sizeof(failure_text), "%s", failure.reason.c_str());
    return 1;
  }
}
}
