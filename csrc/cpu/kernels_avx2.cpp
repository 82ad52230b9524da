// Compiles the kernels for AVX2 with FMA.
#include "attention_kernel.h"

#if defined(FLAMINGO_X86_KERNELS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FLAMINGO_LANES 8
namespace flamingo {
namespace cpu {
namespace avx2 {
#include "vector.inl"
#include "gemm.inl"
#include "operands.inl"
#include "attention.inl"
using Float32 = Attention<FloatOperands<float>, float>;
using BFloat16 = Attention<FloatOperands<uint16_t>, uint16_t>;
}  // namespace avx2

const KernelSet kAvx2Kernels = {"avx2",
                                {avx2::Float32::forward, avx2::BFloat16::forward},
                                {avx2::Float32::backward, avx2::BFloat16::backward}};
}  // namespace cpu
}  // namespace flamingo
#pragma GCC pop_options
#endif
