// Defines the kernels that only flamingo::resampler_attention needs.
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

// Combines the parts of a forward with splits, in their order: the output is their mean, weighted by the exponential of
// lse. A thread has eight columns of a row.
template <Type kType, int kWidth>
FLAMINGO_KERNEL(kThreads, 4)
combine_parts(const ResamplerParams p) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int64_t rows = static_cast<int64_t>(p.rows) * p.heads;
  const int64_t chunk = static_cast<int64_t>(block_x()) * kThreads + thread_number(), row = chunk / (kWidth / 8);
  if (row >= rows) return;
  float maximum = minus_infinity();
  for (int split = 0; split < p.splits; ++split) maximum = fmaxf(maximum, p.part_lse[split * rows + row]);
  const float base = exponent_base(maximum);
  float weights = 0.0f, sum[8] = {};
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) {
    const float weight = power_of_two((p.part_lse[split * rows + row] - base) * kLog2E);
    const FourFloats* part = reinterpret_cast<const FourFloats*>(p.parts + split * rows * kWidth + chunk * 8);
    const FourFloats low = part[0], high = part[1];
    weights += weight;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += weight * low.values[i];
      sum[i + 4] += weight * high.values[i];
    }
  }
  const float factor = weights > 0.0f ? 1.0f / weights : 0.0f;
  Chunk out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = pack<kType>(sum[2 * i] * factor, sum[2 * i + 1] * factor);
  *reinterpret_cast<Chunk*>(p.out + chunk * 8) = out;
  if (chunk % (kWidth / 8) == 0) p.lse[row] = maximum + natural_log(weights);
}

}  // namespace cuda
}  // namespace flamingo
