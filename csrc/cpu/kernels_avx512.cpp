// Compiles the kernels for AVX-512 (F, BW, DQ, VL).
#include "attention_kernel.h"

#if defined(FLAMINGO_X86_KERNELS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define FLAMINGO_LANES 16
namespace flamingo {
namespace cpu {
namespace avx512 {
#include "vector.inl"
#include "gemm.inl"
#include "operands.inl"
#include "attention.inl"
using Float32 = Attention<FloatOperands<float>, float>;
using BFloat16 = Attention<FloatOperands<uint16_t>, uint16_t>;
}  // namespace avx512

const KernelSet kAvx512Kernels = {"avx512",
                                {avx512::Float32::forward, avx512::BFloat16::forward},
                                {avx512::Float32::backward, avx512::BFloat16::backward}};
}  // namespace cpu
}  // namespace flamingo
#pragma GCC pop_options
#endif
