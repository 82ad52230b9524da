// Computes the forward of both ops. A thread block owns 64 query rows of one head and visits their keys 64 at a time,
// with a running maximum and sum. While one block of keys is used, the next is being copied.
//
// Width 64 has two stages of keys and values. Other widths have three tiles that keys and values use in turns, so that a
// multiprocessor of sm_90 holds three thread blocks instead of two.
#pragma once
#include "problem.cuh"
#include "warpgroup.cuh"

namespace flamingo {
namespace cuda {

template <int kWidth>
constexpr bool kTakesTurns = kWidth != 64;

template <int kWidth>
constexpr int forward_shared_bytes() {
  return (kTakesTurns<kWidth> ? 4 : 5) * Tile<kWidth>::kSize * static_cast<int>(sizeof(uint16_t));
}

// Running statistics of the two rows of a thread; the sums are of this lane's columns only.
struct Softmax {
  float max_first, max_second, sum_first, sum_second;
};

// Sets the scores of keys that a row must not see to minus infinity.
FLAMINGO_DEVICE void mask_scores(float (&s)[8][4], int valid_keys, bool sees_first, bool sees_second) {
  const int column = (lane_number() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool seen = n * 8 + column + (i & 1) < valid_keys && (i < 2 ? sees_first : sees_second);
      s[n][i] = seen ? s[n][i] : minus_infinity();
    }
}

// The maximum of a row that has seen no key is minus infinity. Its exponents are taken relative to 0.
FLAMINGO_DEVICE float exponent_base(float maximum) { return maximum == minus_infinity() ? 0.0f : maximum; }

FLAMINGO_DEVICE void max_of_scores(const float (&s)[8][4], float& first, float& second) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    first = fmaxf(first, fmaxf(s[n][0], s[n][1]));
    second = fmaxf(second, fmaxf(s[n][2], s[n][3]));
  }
  first = max_of_row(first);
  second = max_of_row(second);
}

// Turns scores into exponentials relative to the new maxima, and rescales the earlier sums.
// `log2_scale`: scale of the scores times log2(e).
template <int kColumns>
FLAMINGO_DEVICE void update_softmax(Softmax& state, float (&s)[8][4], float (&sum)[kColumns][4], float log2_scale) {
  float max_first = state.max_first, max_second = state.max_second;
  max_of_scores(s, max_first, max_second);
  const float base_first = exponent_base(max_first), base_second = exponent_base(max_second);
  const float rescale_first = power_of_two((state.max_first - base_first) * log2_scale);
  const float rescale_second = power_of_two((state.max_second - base_second) * log2_scale);
  state.max_first = max_first;
  state.max_second = max_second;
  state.sum_first *= rescale_first;
  state.sum_second *= rescale_second;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    sum[n][0] *= rescale_first;
    sum[n][1] *= rescale_first;
    sum[n][2] *= rescale_second;
    sum[n][3] *= rescale_second;
  }
  const float shift_first = base_first * log2_scale, shift_second = base_second * log2_scale;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[n][i] = power_of_two(s[n][i] * log2_scale - shift_first);  // one instruction before the power
      s[n][i + 2] = power_of_two(s[n][i + 2] * log2_scale - shift_second);
      state.sum_first += s[n][i];
      state.sum_second += s[n][i + 2];
    }
}

// Returns tanh(gate), or 1. It is read where it is used, so that no register holds it.
FLAMINGO_DEVICE float out_factor(const AttentionParams& p) { return p.out_scale ? *p.out_scale : 1.0f; }

// Products, and the copies of what they read: those of a warpgroup where the hardware has them.
template <int kWidth, bool kForget = false>
FLAMINGO_DEVICE void copy_operand(uint16_t* tile, const uint16_t* matrix, int64_t stride, int valid) {
  if constexpr (kWarpgroups) copy_panels<kWidth>(tile, matrix, stride, valid);
  else copy_tile<kWidth, kForget>(tile, matrix, stride, valid);
}
template <Type kType, int kWidth>
FLAMINGO_DEVICE void compute_scores(float (&s)[8][4], const uint16_t* queries, const uint16_t* keys) {
  if constexpr (kWarpgroups) group_multiply_transposed<kType, kWidth>(s, queries, keys);
  else multiply_transposed<kType, kWidth>(s, queries, keys);
}
template <Type kType, int kWidth>
FLAMINGO_DEVICE void add_values(float (&sum)[kWidth / 8][4], const float (&weights)[8][4], const uint16_t* values) {
  if constexpr (kWarpgroups) group_accumulate_rows<kType, kWidth>(sum, weights, values);
  else accumulate_rows<kType, kWidth>(sum, weights, values);
}

// Returns whether a warp takes part in the products of a block of keys: all warps of a group have to.
FLAMINGO_DEVICE bool takes_part(bool sees_first, bool sees_second) {
  return kWarpgroups || any_lane(sees_first || sees_second);
}

// How many thread blocks of a forward shall fit on a multiprocessor.
#if defined(FLAMINGO_WARPGROUPS)
constexpr int kNarrowBlocks = 5, kResamplerBlocks = 5, kWideBlocks = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kNarrowBlocks = 4, kResamplerBlocks = 3, kWideBlocks = 2;  // ptxas would spill 4 bytes with 4 blocks
#else
constexpr int kNarrowBlocks = 4, kResamplerBlocks = 4, kWideBlocks = 3;
#endif

// Visits the blocks of keys of a row tile. Two stages of keys and values follow the queries in shared memory.
template <Type kType, int kWidth, class Walk>
FLAMINGO_DEVICE void visit_in_stages(Walk& walk, uint16_t* queries, Softmax& state, float (&sum)[kWidth / 8][4],
                                     float log2_scale) {
  uint16_t* stages = queries + Tile<kWidth>::kSize;
  const auto copy_keys = [&](uint16_t* stage) {
    if (walk.left > 0) {
      const Keys keys = walk.keys();
      copy_operand<kWidth>(stage, keys.k, keys.k_stride, keys.valid);
      copy_operand<kWidth>(stage + Tile<kWidth>::kSize, keys.v, keys.v_stride, keys.valid);
    }
    commit_copies();
  };
  copy_keys(stages);
  for (int stage = 0; walk.left > 0; stage ^= 1) {
    const uint16_t* keys = stages + stage * 2 * Tile<kWidth>::kSize;
    const bool sees_first = walk.sees_first(), sees_second = walk.sees_second();
    const int valid = walk.valid();
    wait_copies<0>();
    publish_writes();
    barrier();  // all warps can read this block, and no warp reads the other stage any more
    walk.advance();
    copy_keys(stages + (stage ^ 1) * 2 * Tile<kWidth>::kSize);
    if (!takes_part(sees_first, sees_second)) continue;
    float s[8][4];
    compute_scores<kType, kWidth>(s, queries, keys);
    mask_scores(s, valid, sees_first, sees_second);
    update_softmax(state, s, sum, log2_scale);
    add_values<kType, kWidth>(sum, s, keys + Tile<kWidth>::kSize);
  }
}

// Does the same with three tiles instead of two stages: while keys and values are used one after the other, the next
// ones are copied into the tile that is free.
template <Type kType, int kWidth, class Walk>
FLAMINGO_DEVICE void visit_in_turns(Walk& walk, uint16_t* queries, Softmax& state, float (&sum)[kWidth / 8][4],
                                    float log2_scale) {
  const auto copy_k = [&](uint16_t* tile) {
    const Keys keys = walk.keys();
    if (walk.left > 0) copy_operand<kWidth>(tile, keys.k, keys.k_stride, keys.valid);
    commit_copies();
  };
  const auto copy_v = [&](uint16_t* tile) {
    const Keys keys = walk.keys();
    if (walk.left > 0) copy_operand<kWidth>(tile, keys.v, keys.v_stride, keys.valid);
    commit_copies();
  };
  uint16_t *k = queries + Tile<kWidth>::kSize, *v = k + Tile<kWidth>::kSize, *unused = v + Tile<kWidth>::kSize;
  copy_k(k);
  copy_v(v);
  while (walk.left > 0) {
    const bool sees_first = walk.sees_first(), sees_second = walk.sees_second();
    const bool part = takes_part(sees_first, sees_second);
    const int valid = walk.valid();
    wait_copies<1>();
    publish_writes();
    barrier();  // all warps can read these keys, and no warp reads the values before them any more
    walk.advance();
    copy_k(unused);
    float s[8][4];
    if (part) {
      compute_scores<kType, kWidth>(s, queries, k);
      mask_scores(s, valid, sees_first, sees_second);
      update_softmax(state, s, sum, log2_scale);
    }
    wait_copies<1>();
    publish_writes();
    barrier();  // all warps can read these values, and no warp reads the keys any more
    copy_v(k);
    if (part) add_values<kType, kWidth>(sum, s, v);
    uint16_t* const read = v;
    v = k;
    k = unused;
    unused = read;
  }
}

// With kSplits several thread blocks share the keys of a row tile. Each writes a part: an output of its own.
template <Type kType, int kWidth, class Problem, bool kSplits = false>
FLAMINGO_KERNEL(kThreads, kWidth != 64 ? kWideBlocks : Problem::kSavesStatistics ? kResamplerBlocks : kNarrowBlocks)
attention_forward(const typename Problem::Params p) {
  uint16_t* queries = shared_memory();
  const int head = block_y(), key_head = Problem::key_head(p, head);
  const Rows rows = Problem::row_tile(p, block_x());
  copy_operand<kWidth>(queries, p.q + rows.first * p.q_row + head * p.q_head, p.q_row, rows.valid);
  typename Problem::Walk walk(p, rows, key_head);
  if constexpr (kSplits) walk.take(block_z(), p.splits);
  const float log2_scale = p.scale * 1.4426950408889634f;

  Softmax state = {minus_infinity(), minus_infinity(), 0.0f, 0.0f};
  float sum[kWidth / 8][4];
  clear(sum);
  if constexpr (kTakesTurns<kWidth>) visit_in_turns<kType, kWidth>(walk, queries, state, sum, log2_scale);
  else visit_in_stages<kType, kWidth>(walk, queries, state, sum, log2_scale);

  const float sum_first = sum_of_row(state.sum_first), sum_second = sum_of_row(state.sum_second);
  const float factor = kSplits ? 1.0f : out_factor(p);
  const float factor_first = sum_first > 0.0f ? factor / sum_first : 0.0f;
  const float factor_second = sum_second > 0.0f ? factor / sum_second : 0.0f;
  const bool exists_first = fragment_row() < rows.valid, exists_second = fragment_row() + 8 < rows.valid;
  const int64_t row_stride = static_cast<int64_t>(p.heads) * kWidth;
  const int64_t first_row = (kSplits ? static_cast<int64_t>(block_z()) * p.rows : 0) + rows.first;
  if constexpr (kSplits)
    store_parts<kWidth>(p.parts + first_row * row_stride + head * kWidth, row_stride, sum, factor_first, factor_second,
                        exists_first, exists_second);
  else
    store_rows<kType, kWidth>(p.out + first_row * row_stride + head * kWidth, row_stride, sum, factor_first,
                              factor_second, exists_first, exists_second);
  if constexpr (Problem::kSavesStatistics) {
    float* all = p.lse;
    if constexpr (kSplits) all = p.part_lse;
    float* lse = all + (first_row + fragment_row()) * p.heads + head;
    if ((lane_number() & 3) == 0 && exists_first) *lse = state.max_first * p.scale + natural_log(sum_first);
    if ((lane_number() & 3) == 0 && exists_second)
      lse[8 * p.heads] = state.max_second * p.scale + natural_log(sum_second);
  }
}

}  // namespace cuda
}  // namespace flamingo
