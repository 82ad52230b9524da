// Defines the kernel that only flamingo::resampler_attention needs.
#pragma once
#include "attention_backward.cuh"

namespace flamingo {
namespace cuda {

// Computes the gradients of the keys after backward_rows, where a medium has more than 64 latents.
template <Type kType, int kWidth>
FLAMINGO_KERNEL(kThreads, backward_blocks<kWidth>(false))
resampler_backward_keys(const ResamplerParams p) {
  using Problem = ResamplerAttention<kWidth>;
  const Slot slot = find_slot(p, block_x());
  if (!slot.exists) return;
  const Range range = {slot.medium * p.latents, (slot.medium + 1) * p.latents};
  backward_of_block<kType, kWidth, Problem, false>(p, {range.begin, 0}, slot.block, block_y(), range);
}

}  // namespace cuda
}  // namespace flamingo
