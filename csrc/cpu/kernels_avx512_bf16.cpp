// Compiles the kernels for AVX-512 with bfloat16 products. An instruction multiplies two pairs of bfloat16 values and
// adds both products to a float32 sum.
#include "attention_kernel.h"

#if defined(FLAMINGO_X86_KERNELS)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define FLAMINGO_LANES 16
namespace flamingo {
namespace cpu {
namespace avx512_bf16 {
#include "vector.inl"
static inline Vec multiply_add(const uint32_t* a, const uint32_t* b, Vec c) {
  const __m512i left = _mm512_set1_epi32(static_cast<int>(*a));
  const __m512i right = _mm512_loadu_si512(b);
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(left),
                                                reinterpret_cast<__m512bh>(right)));
}
#include "gemm.inl"
#include "operands.inl"
#include "operands_bf16.inl"
#include "attention.inl"
using BFloat16 = Attention<PairOperands, uint16_t>;
}  // namespace avx512_bf16

const KernelSet kAvx512Bf16Kernels = {"avx512_bf16",
                                      {kAvx512Kernels.forward[0], avx512_bf16::BFloat16::forward},
                                      {kAvx512Kernels.backward[0], avx512_bf16::BFloat16::backward}};
}  // namespace cpu
}  // namespace flamingo
#pragma GCC pop_options
#endif
