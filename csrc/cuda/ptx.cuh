// Wraps each instruction of the kernels in a function. With FLAMINGO_EMULATOR and without nvcc the emulator defines the
// same names, so that the tests run the kernels on a CPU.
//
// All of them exist from sm_80 on, but those of warpgroup.cuh.
#pragma once
#include <stdint.h>

#include "params.h"

#if defined(FLAMINGO_EMULATOR)
#include "../emulator/simt.h"
#else
#include <assert.h>
#include <cuda_runtime.h>

#define FLAMINGO_DEVICE __device__ __forceinline__
// `blocks`: how many blocks shall fit on a multiprocessor, which limits the registers.
#define FLAMINGO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FLAMINGO_ASSERT(condition) assert(condition)

// Does the same in the kernels of the attentions. Those of sm_90a stop without a message, since ptxas makes a kernel that
// calls a function wait after each product of a warpgroup.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLAMINGO_WARPGROUPS
#define FLAMINGO_CHECK(condition) \
  if (!(condition)) __trap()
#else
#define FLAMINGO_CHECK(condition) assert(condition)
#endif

namespace flamingo {
namespace cuda {

FLAMINGO_DEVICE int thread_number() { return threadIdx.x; }
FLAMINGO_DEVICE int block_x() { return blockIdx.x; }
FLAMINGO_DEVICE int block_y() { return blockIdx.y; }
FLAMINGO_DEVICE int block_z() { return blockIdx.z; }

// The tiles that a warpgroup multiplies start at multiples of 1024 bytes.
FLAMINGO_DEVICE uint16_t* shared_memory() {
  extern __shared__ __align__(1024) uint16_t memory[];
  return memory;
}

FLAMINGO_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

FLAMINGO_DEVICE void store_word(uint16_t* shared, uint32_t word) { *reinterpret_cast<uint32_t*>(shared) = word; }

// Starts a copy of 16 bytes from global to shared memory, of zeros if not `valid` (then nothing is read).
FLAMINGO_DEVICE void copy_16_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0));
}
FLAMINGO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// Waits until at most `pending` of this thread's committed groups are still being copied.
template <int pending>
FLAMINGO_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending));
}

FLAMINGO_DEVICE void barrier() { __syncthreads(); }

// Loads four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
FLAMINGO_DEVICE void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
FLAMINGO_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] * b [16, 8].
template <Type kType>
FLAMINGO_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == Type::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <Type kType>
FLAMINGO_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kType == Type::kBFloat16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <Type kType>
FLAMINGO_DEVICE float unpack(uint16_t x) {
  float value;
  if constexpr (kType == Type::kBFloat16) value = __uint_as_float(static_cast<uint32_t>(x) << 16);
  else asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(x));
  return value;
}

// Returns the value of the lane whose number differs in the bits of `mask`.
FLAMINGO_DEVICE float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FLAMINGO_DEVICE uint32_t exchange(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FLAMINGO_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
FLAMINGO_DEVICE int smallest_lane(int x) { return __reduce_min_sync(0xffffffffu, x); }
FLAMINGO_DEVICE int largest_lane(int x) { return __reduce_max_sync(0xffffffffu, x); }

FLAMINGO_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
FLAMINGO_DEVICE float natural_log(float x) { return __logf(x); }

// Returns x, and hides from the compiler that it is x. Expressions of it are then computed again instead of occupying
// registers since their last use.
FLAMINGO_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

FLAMINGO_DEVICE void lower_to(int* p, int x) { atomicMin(p, x); }
FLAMINGO_DEVICE void raise_to(int* p, int x) { atomicMax(p, x); }

}  // namespace cuda
}  // namespace flamingo
#endif

namespace flamingo {
namespace cuda {
struct alignas(16) Chunk {  // eight 16-bit values: the unit of copies
  uint32_t words[4];
};
struct alignas(16) FourFloats {
  float values[4];
};
struct alignas(8) TwoFloats {
  float values[2];
};
FLAMINGO_DEVICE float minus_infinity() { return -__builtin_huge_valf(); }
FLAMINGO_DEVICE int min(int a, int b) { return a < b ? a : b; }
FLAMINGO_DEVICE int max(int a, int b) { return a > b ? a : b; }
}  // namespace cuda
}  // namespace flamingo
