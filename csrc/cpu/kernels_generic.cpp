// Compiles the kernels for any processor, with 128-bit vectors, which every 64-bit x86 and ARM processor has.
#include "attention_kernel.h"

#define FLAMINGO_LANES 4
namespace flamingo {
namespace cpu {
namespace generic {
#include "vector.inl"
#include "gemm.inl"
#include "operands.inl"
#include "attention.inl"
using Float32 = Attention<FloatOperands<float>, float>;
using BFloat16 = Attention<FloatOperands<uint16_t>, uint16_t>;
}  // namespace generic

const KernelSet kGenericKernels = {"generic",
                                   {generic::Float32::forward, generic::BFloat16::forward},
                                   {generic::Float32::backward, generic::BFloat16::backward}};
}  // namespace cpu
}  // namespace flamingo
