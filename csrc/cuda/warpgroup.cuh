// Multiplies tiles with four warps at once, by the wgmma instructions of sm_90a. It reads shared memory a third as often
// as mma.sync, which binds the kernels otherwise. Each warp has sixteen rows of the result, as fragments like those of
// tile.cuh.
//
// A product runs after its instruction. Its sums hold nothing until finish_products, and before it start_products must
// follow what wrote the registers. It reads shared memory by the asynchronous proxy, so publish_writes must follow the
// wait for copies, and stores.
#pragma once
#include "tile.cuh"

namespace flamingo {
namespace cuda {

#if defined(FLAMINGO_WARPGROUPS)
constexpr bool kWarpgroups = true;
#else
constexpr bool kWarpgroups = false;
#endif

#if !defined(FLAMINGO_EMULATOR)
// Makes what this thread wrote to shared memory visible to the products that a barrier orders after it: its copies that
// have arrived, and its stores.
FLAMINGO_DEVICE void publish_writes() {
  if constexpr (kWarpgroups) asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

FLAMINGO_DEVICE void start_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
FLAMINGO_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
FLAMINGO_DEVICE void finish_products() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

// Operands of an instruction: the sums c of 64, 96 or 128 columns, and their names.
#define FLAMINGO_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FLAMINGO_SUMS_32(n) FLAMINGO_SUMS(n), FLAMINGO_SUMS(n + 1), FLAMINGO_SUMS(n + 2), FLAMINGO_SUMS(n + 3)
#define FLAMINGO_SUMS_64 FLAMINGO_SUMS_32(0), FLAMINGO_SUMS_32(4)
#define FLAMINGO_SUMS_96 FLAMINGO_SUMS_64, FLAMINGO_SUMS_32(8)
#define FLAMINGO_SUMS_128 FLAMINGO_SUMS_96, FLAMINGO_SUMS_32(12)
#define FLAMINGO_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLAMINGO_NAMES_96 \
  FLAMINGO_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FLAMINGO_NAMES_128 \
  FLAMINGO_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The product adds to what the sums hold; ptxas sees where that is zero.
#define FLAMINGO_PRODUCT(columns, type, rest) \
  "{.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" FLAMINGO_NAMES_##columns "}, " rest ";}\n"

// Tiles in shared memory are described by `describe`.

// c [64, 64] += a [64, 16] * b [64, 16]^T.
template <Type kType>
FLAMINGO_DEVICE void multiply_group(float (&c)[8][4], uint64_t a, uint64_t b) {
#define FLAMINGO_SCORES(type) \
  asm volatile(FLAMINGO_PRODUCT(64, type, "%32, %33, adds, 1, 1, 0, 0") : FLAMINGO_SUMS_64 : "l"(a), "l"(b))
  if constexpr (kType == Type::kBFloat16) FLAMINGO_SCORES("bf16");
  else FLAMINGO_SCORES("f16");
#undef FLAMINGO_SCORES
}

// c [64, kColumns] += a [64, 16] * b [16, kColumns]. Each warp has sixteen rows of a, as for `multiply`.
template <Type kType, int kColumns>
FLAMINGO_DEVICE void multiply_group(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
#define FLAMINGO_ROWS(columns, type, operands) \
  asm volatile(FLAMINGO_PRODUCT(columns, type, operands ", adds, 1, 1, 1") \
               : FLAMINGO_SUMS_##columns : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FLAMINGO_ROWS_OF(type) \
  if constexpr (kColumns == 64) FLAMINGO_ROWS(64, type, "{%32, %33, %34, %35}, %36"); \
  else if constexpr (kColumns == 96) FLAMINGO_ROWS(96, type, "{%48, %49, %50, %51}, %52"); \
  else FLAMINGO_ROWS(128, type, "{%64, %65, %66, %67}, %68")
  if constexpr (kType == Type::kBFloat16) {
    FLAMINGO_ROWS_OF("bf16");
  } else {
    FLAMINGO_ROWS_OF("f16");
  }
#undef FLAMINGO_ROWS_OF
#undef FLAMINGO_ROWS
}

// c [64, kColumns] += a [16, 64]^T * b [16, kColumns].
template <Type kType, int kColumns>
FLAMINGO_DEVICE void multiply_group_transposed(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b) {
#define FLAMINGO_KEYS(columns, type, operands) \
  asm volatile(FLAMINGO_PRODUCT(columns, type, operands ", adds, 1, 1, 1, 1") : FLAMINGO_SUMS_##columns : "l"(a), "l"(b))
#define FLAMINGO_KEYS_OF(type) \
  if constexpr (kColumns == 64) FLAMINGO_KEYS(64, type, "%32, %33"); \
  else if constexpr (kColumns == 96) FLAMINGO_KEYS(96, type, "%48, %49"); \
  else FLAMINGO_KEYS(128, type, "%64, %65")
  if constexpr (kType == Type::kBFloat16) {
    FLAMINGO_KEYS_OF("bf16");
  } else {
    FLAMINGO_KEYS_OF("f16");
  }
#undef FLAMINGO_KEYS_OF
#undef FLAMINGO_KEYS
}
#endif

// A tile for a warpgroup has panels of 64 columns, one after the other. Each is as Tile<64>, which the hardware calls a
// swizzle of 128 bytes.
constexpr int kPanel = kTile * 64;
constexpr int kSixteenRows = 128;  // in units of a description, which are 16 bytes

template <int kWidth>
FLAMINGO_DEVICE void copy_panels(uint16_t* tile, const uint16_t* matrix, int64_t stride, int valid) {
  copy_tile<64>(tile, matrix, stride, valid);
  if constexpr (kWidth > 64)
    copy_columns<64, 0, kWidth / 8 - 8, false>(tile + kPanel, matrix + 64, stride, valid);
}

// Describes a tile to the hardware: its address, the distance of panels, the distance of eight rows, and the swizzle. All
// distances are in units of 16 bytes.
FLAMINGO_DEVICE uint64_t describe(const uint16_t* tile) {
  constexpr uint64_t kPanelUnits = kPanel / 8, kEightRows = 64, kSwizzle = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | kPanelUnits << 16 | kEightRows << 32 | kSwizzle << 62;
}

// Issues what multiply_transposed adds up: s += a b^T.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void issue_transposed(float (&s)[8][4], const uint16_t* a, const uint16_t* b) {
  const uint64_t left = describe(a), right = describe(b);
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const int units = k / 4 * (kPanel / 8) + k % 4 * 2;  // of sixteen columns
    multiply_group<kType>(s, left + units, right + units);
  }
}

// Issues what accumulate_keys computes: sum += w^T b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void issue_keys(float (&sum)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  const uint64_t left = describe(w), right = describe(b);
#pragma unroll
  for (int k = 0; k < 4; ++k)  // sixteen rows each
    multiply_group_transposed<kType, kWidth>(sum, left + k * kSixteenRows, right + k * kSixteenRows);
}

// Computes what multiply_transposed does: s = a b^T.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void group_multiply_transposed(float (&s)[8][4], const uint16_t* a, const uint16_t* b) {
  clear(s);
  start_products();
  issue_transposed<kType, kWidth>(s, a, b);
  commit_products();
  finish_products();
}

// Does it twice at a time: s = a b^T and t = c d^T.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void group_multiply_transposed(float (&s)[8][4], const uint16_t* a, const uint16_t* b, float (&t)[8][4],
                                               const uint16_t* c, const uint16_t* d) {
  clear(s);
  clear(t);
  start_products();
  issue_transposed<kType, kWidth>(s, a, b);
  issue_transposed<kType, kWidth>(t, c, d);
  commit_products();
  finish_products();
}

// Computes what accumulate_rows does: sum += w b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void group_accumulate_rows(float (&sum)[kWidth / 8][4], const float (&w)[8][4], const uint16_t* b) {
  const uint64_t right = describe(b);
  uint32_t left[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pack_rows<kType>(left[k], w, k);
  start_products();
#pragma unroll
  for (int k = 0; k < 4; ++k) multiply_group<kType, kWidth>(sum, left[k], right + k * kSixteenRows);
  commit_products();
  finish_products();
}

// Computes what accumulate_keys does: sum += w^T b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void group_accumulate_keys(float (&sum)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  start_products();
  issue_keys<kType, kWidth>(sum, w, b);
  commit_products();
  finish_products();
}

// Does it twice at a time: s += v^T a and t += w^T b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void group_accumulate_keys(float (&s)[kWidth / 8][4], const uint16_t* v, const uint16_t* a,
                                           float (&t)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  start_products();
  issue_keys<kType, kWidth>(s, v, a);
  issue_keys<kType, kWidth>(t, w, b);
  commit_products();
  finish_products();
}

}  // namespace cuda
}  // namespace flamingo
