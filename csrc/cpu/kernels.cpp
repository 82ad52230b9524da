// Chooses the kernels for this processor, and bounds their scratch memory.
#include "attention_kernel.h"

namespace flamingo {
namespace cpu {

namespace {

Isa detect_isa() {
#if defined(FLAMINGO_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa& selection() {
  static Isa isa = detect_isa();
  return isa;
}

// Packed operands are never larger than float32. Every array of the kernels is rounded up to 64 bytes; a multiple of
// 64 values needs no rounding.
constexpr int64_t kFloat = sizeof(float);

}  // namespace

int64_t forward_scratch_bytes(const Group& group) {
  const int64_t packed = kBlockKeys * group.width, scores = kTileRows * kBlockKeys;
  return kFloat * (group.block_count() * (2 * packed + scores) + 3 * packed + scores);
}

int64_t backward_scratch_bytes(const Group& group) {
  const int64_t packed = kBlockKeys * group.width, scores = kTileRows * kBlockKeys;
  return kFloat * (group.block_count() * (5 * packed + 2 * scores) + 6 * packed + 3 * scores);
}

Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

Isa selected_isa() { return selection(); }

void select_isa(Isa isa) { selection() = isa; }

const KernelSet& kernels() {
#if defined(FLAMINGO_X86_KERNELS)
  switch (selection()) {
    case Isa::kAvx512Bf16: return kAvx512Bf16Kernels;
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

}  // namespace cpu
}  // namespace flamingo
