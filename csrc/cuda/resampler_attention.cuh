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
  float maximum = minus_infinity(), weights = 0.0f, sum[8] = {};
  for (int first = 0; first < p.splits; first += kPartsAtOnce) {
    float lse[kPartsAtOnce], largest = maximum;
    FourFloats low[kPartsAtOnce], high[kPartsAtOnce];
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      lse[i] = first + i < p.splits ? p.part_lse[(first + i) * rows + row] : minus_infinity();
      load_part(low[i], high[i], p.parts + chunk * 8, rows * kWidth, first + i, p.splits);
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) largest = fmaxf(largest, lse[i]);
    const float base = exponent_base(largest), rescale = power_of_two((maximum - base) * kLog2E);
    maximum = largest;
    weights *= rescale;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= rescale;
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const float weight = power_of_two((lse[i] - base) * kLog2E);
      weights += weight;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k] += weight * low[i].values[k];
        sum[k + 4] += weight * high[i].values[k];
      }
    }
  }
  const float factor = weights > 0.0f ? 1.0f / weights : 0.0f;
  Chunk out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = pack<kType>(sum[2 * i] * factor, sum[2 * i + 1] * factor);
  *reinterpret_cast<Chunk*>(p.out + chunk * 8) = out;
  if (chunk % (kWidth / 8) == 0) p.lse[row] = maximum + natural_log(weights);
}

// Adds the parts of dQ of a backward with splits.
template <Type kType, int kWidth>
FLAMINGO_KERNEL(kThreads, 4)
sum_row_parts(const ResamplerParams p) {
  const int64_t size = static_cast<int64_t>(p.rows) * p.heads * kWidth;
  const int64_t at = (static_cast<int64_t>(block_x()) * kThreads + thread_number()) * 8;
  if (at < size) sum_parts<kType>(p.dq + at, p.parts + at, size, p.splits);
}

}  // namespace cuda
}  // namespace flamingo
