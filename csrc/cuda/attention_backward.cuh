// Computes the backward of both ops. P are the softmax weights of a row, dP = dO V^T, delta = sum(P dP). Then
//   dV = P^T dO,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,
// all times out_scale. The gradient of out_scale is the sum of delta, from the output before it was scaled, so it is
// right when out_scale is 0.
//
// There are two kernels, without atomics. `backward_rows` owns query rows and visits their keys; `backward_keys` owns
// keys and visits their rows. Where one of them visits everything, it writes all gradients and the other does not run:
//   - resampler with up to 64 latents: backward_rows also writes dK and dV, since a block of keys has no other rows;
//   - one medium of up to 64 latents a row: backward_keys also writes dQ, since a row has no other keys, and
//     computes the softmax itself.
#pragma once
#include "attention_forward.cuh"

namespace flamingo {
namespace cuda {

// Statistics of the two rows of a thread. `lse` is in units of the scaled scores.
struct RowStatistics {
  float lse_first, lse_second, delta_first, delta_second;
};

template <int kWidth>
constexpr int backward_shared_bytes() {
  return (6 * Tile<kWidth>::kSize + 2 * Tile<64>::kSize) * static_cast<int>(sizeof(uint16_t));
}

// Returns how many blocks shall fit on a multiprocessor, which limits the registers. `alone`: whether this kernel is the
// whole backward. Without products of warpgroups the other kernels would spill with 168 registers.
template <int kWidth>
constexpr int backward_blocks(bool alone) {
  return kWidth == 64 && (alone || kWarpgroups) ? 3 : 2;
}

// Computes scores and dP, like compute_scores of the forward: s = a b^T and t = c d^T.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void compute_scores(float (&s)[8][4], const uint16_t* a, const uint16_t* b, float (&t)[8][4],
                                    const uint16_t* c, const uint16_t* d) {
  if constexpr (kWarpgroups) {
    group_multiply_transposed<kType, kWidth>(s, a, b, t, c, d);
  } else {
    multiply_transposed<kType, kWidth>(s, a, b);
    multiply_transposed<kType, kWidth>(t, c, d);
  }
}

// Adds to gradients of keys: sum += w^T b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void add_keys(float (&sum)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  if constexpr (kWarpgroups) group_accumulate_keys<kType, kWidth>(sum, w, b);
  else accumulate_keys<kType, kWidth>(sum, w, b);
}

// Adds to gradients of keys and values: s += v^T a and t += w^T b.
template <Type kType, int kWidth, bool kForget>
FLAMINGO_DEVICE void add_keys(float (&s)[kWidth / 8][4], const uint16_t* v, const uint16_t* a,
                              float (&t)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  if constexpr (kWarpgroups) {
    group_accumulate_keys<kType, kWidth>(s, v, a, t, w, b);
  } else {
    accumulate_keys<kType, kWidth, kForget>(s, v, a);
    accumulate_keys<kType, kWidth, kForget>(t, w, b);
  }
}

// Turns scores into weights and dP into dS, in place. Scores of unseen keys are minus infinity, so their weights are 0.
FLAMINGO_DEVICE void weights_and_gradients(float (&s)[8][4], float (&dp)[8][4], const RowStatistics& statistics,
                                           float scale) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float log2_scale = scale * kLog2E;
  const float shift_first = statistics.lse_first * kLog2E, shift_second = statistics.lse_second * kLog2E;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float delta = i < 2 ? statistics.delta_first : statistics.delta_second;
      s[n][i] = power_of_two(s[n][i] * log2_scale - (i < 2 ? shift_first : shift_second));
      dp[n][i] = s[n][i] * (dp[n][i] - delta);
    }
}

// Computes delta = sum(O dO) of one row, with the four lanes that hold it.
template <Type kType, int kWidth>
FLAMINGO_DEVICE float delta_of_row(const uint16_t* o, const uint16_t* grad, bool exists) {
  float total = 0.0f;
  for (int chunk = lane_number() & 3; exists && chunk < kWidth / 8; chunk += 4) {
    const Chunk a = *reinterpret_cast<const Chunk*>(o + chunk * 8), b = *reinterpret_cast<const Chunk*>(grad + chunk * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total += unpack<kType>(static_cast<uint16_t>(a.words[i])) * unpack<kType>(static_cast<uint16_t>(b.words[i]));
      total += unpack<kType>(static_cast<uint16_t>(a.words[i] >> 16)) *
               unpack<kType>(static_cast<uint16_t>(b.words[i] >> 16));
    }
  }
  return sum_of_row(total);
}

template <Type kType, int kWidth, class Params>
FLAMINGO_DEVICE RowStatistics saved_statistics(const Params& p, const Rows& rows, int head) {
  const int64_t row = rows.first + fragment_row(), stride = static_cast<int64_t>(p.heads) * kWidth;
  const bool first = fragment_row() < rows.valid, second = fragment_row() + 8 < rows.valid;
  const uint16_t* o = p.o + row * stride + head * kWidth;
  const uint16_t* grad = p.grad + row * p.grad_row + head * p.grad_head;
  return {first ? p.lse[row * p.heads + head] : 0.0f, second ? p.lse[(row + 8) * p.heads + head] : 0.0f,
          delta_of_row<kType, kWidth>(o, grad, first),
          delta_of_row<kType, kWidth>(o + 8 * stride, grad + 8 * p.grad_row, second)};
}

// Running statistics of a first pass: those of the softmax, and the sum of exponential * dP that becomes delta.
FLAMINGO_DEVICE void update_statistics(Softmax& state, float (&delta)[1][4], float (&s)[8][4], const float (&dp)[8][4],
                                       float log2_scale) {
  update_softmax(state, s, delta, log2_scale);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      delta[0][0] += s[n][i] * dp[n][i];
      delta[0][2] += s[n][i + 2] * dp[n][i + 2];
    }
}

FLAMINGO_DEVICE RowStatistics finish_statistics(const Softmax& state, const float (&delta)[1][4], float scale) {
  const float sum_first = sum_of_row(state.sum_first), sum_second = sum_of_row(state.sum_second);
  const float delta_first = sum_of_row(delta[0][0]), delta_second = sum_of_row(delta[0][2]);
  // A row without keys may have any finite lse, since all of its scores are minus infinity.
  return {sum_first > 0.0f ? state.max_first * scale + natural_log(sum_first) : 0.0f,
          sum_second > 0.0f ? state.max_second * scale + natural_log(sum_second) : 0.0f,
          sum_first > 0.0f ? delta_first / sum_first : 0.0f, sum_second > 0.0f ? delta_second / sum_second : 0.0f};
}

// Adds up delta over the rows of a block: one partial sum a warp, summed in a fixed order afterwards.
FLAMINGO_DEVICE void store_partial(float* partial, float delta) {
  delta = (lane_number() & 3) == 0 ? delta : 0.0f;
  for (int distance = 16; distance > 0; distance /= 2) delta += exchange(delta, distance);
  if (lane_number() == 0) partial[warp_number()] = delta;
}

template <int kWidth>
FLAMINGO_DEVICE void copy_keys(uint16_t* stage, const Keys& keys) {
  copy_operand<kWidth>(stage, keys.k, keys.k_stride, keys.valid);
  copy_operand<kWidth>(stage + Tile<kWidth>::kSize, keys.v, keys.v_stride, keys.valid);
}

// Calls `use(block, keys tile)` for the key blocks of a row tile, one after the other. While one is used, the next is
// copied into the other of two stages. Copies that were started before have arrived, too, at the first use.
template <int kWidth, class Problem, class Use>
FLAMINGO_DEVICE void for_each_block(const typename Problem::Params& p, const Rows& rows, const Range& blocks,
                                    int key_head, uint16_t* stages, Use use) {
  if (blocks.begin < blocks.end) copy_keys<kWidth>(stages, Problem::keys(p, rows, blocks.begin, key_head));
  commit_copies();
  for (int block = blocks.begin; block < blocks.end; ++block) {
    const int stage = (block - blocks.begin) & 1;
    wait_copies<0>();
    publish_writes();
    barrier();  // all warps can read this block, and no warp reads the other stage any more
    if (block + 1 < blocks.end)
      copy_keys<kWidth>(stages + (stage ^ 1) * 2 * Tile<kWidth>::kSize, Problem::keys(p, rows, block + 1, key_head));
    commit_copies();
    use(block, stages + stage * 2 * Tile<kWidth>::kSize);
  }
}

// With kSplits several thread blocks share the keys of a row tile, and each writes a part of dQ.
template <Type kType, int kWidth, class Problem, bool kWritesKeys, bool kSplits = false>
FLAMINGO_KERNEL(kThreads, backward_blocks<kWidth>(kWritesKeys))
backward_rows(const typename Problem::Params p) {
  uint16_t* queries = shared_memory();
  uint16_t* grads = queries + Tile<kWidth>::kSize;
  uint16_t* stages = grads + Tile<kWidth>::kSize;
  uint16_t* weights = stages + 4 * Tile<kWidth>::kSize;  // P, then dS
  const int head = block_y(), key_head = Problem::key_head(p, head);
  const Rows rows = Problem::row_tile(p, block_x());
  copy_operand<kWidth>(queries, p.q + rows.first * p.q_row + head * p.q_head, p.q_row, rows.valid);
  copy_operand<kWidth>(grads, p.grad + rows.first * p.grad_row + head * p.grad_head, p.grad_row, rows.valid);
  Range blocks = Problem::blocks_of_tile(p, rows);
  if constexpr (kSplits) blocks = share_of(blocks, block_z(), p.splits);
  const Visible visible = Problem::visible(p, rows);
  const int64_t row_stride = static_cast<int64_t>(p.heads) * kWidth;

  const auto scores = [&](float (&s)[8][4], float (&dp)[8][4], int block, const uint16_t* keys) {
    compute_scores<kType, kWidth>(s, queries, keys, dp, grads, keys + Tile<kWidth>::kSize);
    mask_scores(s, Problem::keys(p, rows, block, key_head).valid, visible.sees_first(block), visible.sees_second(block));
  };

  RowStatistics statistics;
  if constexpr (Problem::kSavesStatistics) {
    statistics = saved_statistics<kType, kWidth>(p, rows, head);
  } else {
    Softmax state = {minus_infinity(), minus_infinity(), 0.0f, 0.0f};
    float delta[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
    for_each_block<kWidth, Problem>(p, rows, blocks, key_head, stages, [&](int block, const uint16_t* keys) {
      float s[8][4], dp[8][4];
      scores(s, dp, block, keys);
      update_statistics(state, delta, s, dp, p.scale * 1.4426950408889634f);
    });
    barrier();  // no warp reads the last keys any more, which the second pass overwrites
    statistics = finish_statistics(state, delta, p.scale);
    const int block = block_y() * ((p.rows + kTile - 1) / kTile) + block_x();
    store_partial(p.partial + static_cast<int64_t>(block) * 4, statistics.delta_first + statistics.delta_second);
  }
  const bool exists_first = fragment_row() < rows.valid, exists_second = fragment_row() + 8 < rows.valid;
  if (!kWritesKeys && (lane_number() & 3) == 0) {  // for backward_keys
    const int64_t at = (static_cast<int64_t>(rows.first) + fragment_row()) * p.heads + head;
    if (exists_first) p.delta[at] = statistics.delta_first;
    if (exists_second) p.delta[at + 8 * p.heads] = statistics.delta_second;
    if (!Problem::kSavesStatistics && exists_first) p.lse[at] = statistics.lse_first;
    if (!Problem::kSavesStatistics && exists_second) p.lse[at + 8 * p.heads] = statistics.lse_second;
  }

  float dq[kWidth / 8][4];
  clear(dq);
  for_each_block<kWidth, Problem>(p, rows, blocks, key_head, stages, [&](int block, const uint16_t* keys) {
    float s[8][4], dp[8][4];
    scores(s, dp, block, keys);
    weights_and_gradients(s, dp, statistics, p.scale);
    add_values<kType, kWidth>(dq, dp, keys);
    if constexpr (kWritesKeys) {
      store_weights<kType>(weights, s);
      store_weights<kType>(weights + Tile<64>::kSize, dp);
      publish_writes();
      barrier();  // the weights of all rows are written
      const Keys out = Problem::keys(p, rows, forget(block), key_head);
      const bool first = fragment_row() < out.valid, second = fragment_row() + 8 < out.valid;
      float sum[kWidth / 8][4];
      clear(sum);
      add_keys<kType, kWidth>(sum, weights, grads);
      const float factor = out_factor(p), scaled = factor * p.scale;
      store_rows<kType, kWidth>(out.dv, row_stride, sum, factor, factor, first, second);
      clear(sum);
      add_keys<kType, kWidth>(sum, weights + Tile<64>::kSize, queries);
      store_rows<kType, kWidth>(out.dk, row_stride, sum, scaled, scaled, first, second);
    }
  });
  const float scaled = out_factor(p) * p.scale;
  if constexpr (kSplits)
    store_parts<kWidth>(p.parts + (static_cast<int64_t>(block_z()) * p.rows + rows.first) * row_stride + head * kWidth,
                        row_stride, dq, scaled, scaled, exists_first, exists_second);
  else
    store_rows<kType, kWidth>(p.dq + rows.first * row_stride + head * kWidth, row_stride, dq, scaled, scaled,
                              exists_first, exists_second);
}

// Numbers the row tiles of a key block: those of one head of the queries, then those of the next one that shares it.
struct RowTile {
  int first, head;

  FLAMINGO_DEVICE Rows rows(const Range& range) const { return {first, min(kTile, range.end - first)}; }
  FLAMINGO_DEVICE RowTile next(const Range& range) const {
    return first + kTile < range.end ? RowTile{first + kTile, head} : RowTile{range.begin, head + 1};
  }
};

// Does the work of weights_and_gradients for rows whose keys are all in this tile, so that no statistics are needed.
// Returns the sum of delta over the two rows.
FLAMINGO_DEVICE float softmax_and_gradients(float (&s)[8][4], float (&dp)[8][4], float scale) {
  Softmax state = {minus_infinity(), minus_infinity(), 0.0f, 0.0f};
  float delta[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
  update_statistics(state, delta, s, dp, scale * 1.4426950408889634f);
  const float sum_first = sum_of_row(state.sum_first), sum_second = sum_of_row(state.sum_second);
  const float inverse_first = sum_first > 0.0f ? 1.0f / sum_first : 0.0f;
  const float inverse_second = sum_second > 0.0f ? 1.0f / sum_second : 0.0f;
  const float delta_first = sum_of_row(delta[0][0]) * inverse_first;
  const float delta_second = sum_of_row(delta[0][2]) * inverse_second;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] *= i < 2 ? inverse_first : inverse_second;
      dp[n][i] = s[n][i] * (dp[n][i] - (i < 2 ? delta_first : delta_second));
    }
  return delta_first + delta_second;
}

template <class Params>
FLAMINGO_DEVICE RowStatistics stored_statistics(const Params& p, const Rows& rows, int head) {
  const int64_t at = (static_cast<int64_t>(rows.first) + fragment_row()) * p.heads + head;
  const bool first = fragment_row() < rows.valid, second = fragment_row() + 8 < rows.valid;
  return {first ? p.lse[at] : 0.0f, second ? p.lse[at + 8 * p.heads] : 0.0f, first ? p.delta[at] : 0.0f,
          second ? p.delta[at + 8 * p.heads] : 0.0f};
}

// Computes the gradients of one key block from the rows `range` of all heads that share its keys, one after the other.
// With kWritesRows no row sees another block, and dQ is written here. `some_rows` tells Problem::keys the medium. With
// kSplits several thread blocks share the rows, and each writes a part of dK and dV.
template <Type kType, int kWidth, class Problem, bool kWritesRows, bool kSplits = false>
FLAMINGO_DEVICE void backward_of_block(const typename Problem::Params& p, const Rows& some_rows, int block,
                                       int key_head, const Range& range) {
  constexpr int kSize = Tile<kWidth>::kSize;
  constexpr bool kForgetCopies = kWidth == 64 && kWritesRows;  // 4 bytes would be spilled otherwise
  constexpr bool kForget = kWidth == 128 && !kWritesRows;  // 28 bytes would be spilled otherwise
  uint16_t* k = shared_memory();
  uint16_t* v = k + kSize;
  uint16_t* stages = v + kSize;  // two times queries and gradients
  uint16_t* weights = stages + 4 * kSize;
  const int64_t row_stride = static_cast<int64_t>(p.heads) * kWidth;
  int left = range.begin < range.end ? (range.end - range.begin + kTile - 1) / kTile * Problem::shared_by(p) : 0;  // tiles
  const auto copy_rows = [&](uint16_t* stage, const RowTile& tile) {
    const Rows rows = tile.rows(range);
    copy_operand<kWidth, kForgetCopies>(stage, p.q + rows.first * p.q_row + tile.head * p.q_head, p.q_row, rows.valid);
    copy_operand<kWidth, kForgetCopies>(stage + kSize, p.grad + rows.first * p.grad_row + tile.head * p.grad_head,
                                        p.grad_row, rows.valid);
  };

  const Keys keys = Problem::keys(p, some_rows, block, key_head);
  const int valid_keys = keys.valid;
  copy_operand<kWidth>(k, keys.k, keys.k_stride, valid_keys);
  copy_operand<kWidth>(v, keys.v, keys.v_stride, valid_keys);
  RowTile tile = {range.begin, key_head * Problem::shared_by(p)};
  if (left > 0) copy_rows(stages + (left & 1) * 2 * kSize, tile);
  commit_copies();
  float dk[kWidth / 8][4], dv[kWidth / 8][4], delta = 0.0f;
  clear(dk);
  clear(dv);
  for (; left > 0; --left, tile = tile.next(range)) {
    const uint16_t* queries = stages + (left & 1) * 2 * kSize;
    const uint16_t* grads = queries + kSize;
    wait_copies<0>();
    publish_writes();
    barrier();  // all warps can read this tile, and no warp reads the other stage or the weights any more
    if (left > 1) copy_rows(stages + (~left & 1) * 2 * kSize, tile.next(range));
    commit_copies();
    const Rows rows = tile.rows(range);
    const Visible visible = Problem::visible(p, rows);
    const bool sees_first = visible.sees_first(block), sees_second = visible.sees_second(block);
    float s[8][4], dp[8][4];
    compute_scores<kType, kWidth>(s, queries, k, dp, grads, v);
    mask_scores(s, valid_keys, sees_first, sees_second);
    if constexpr (kWritesRows) delta += softmax_and_gradients(s, dp, p.scale);
    else weights_and_gradients(s, dp, stored_statistics(p, rows, tile.head), p.scale);
    store_weights<kType>(weights, s);
    store_weights<kType>(weights + Tile<64>::kSize, dp);
    if constexpr (kWritesRows) {
      float dq[kWidth / 8][4];
      clear(dq);
      add_values<kType, kWidth>(dq, dp, k);
      const float scaled = out_factor(p) * p.scale;
      store_rows<kType, kWidth>(p.dq + rows.first * row_stride + tile.head * kWidth, row_stride, dq, scaled, scaled,
                                sees_first, sees_second);
    }
    publish_writes();
    barrier();  // the weights of all rows are written
    add_keys<kType, kWidth, kForget>(dv, weights, grads, dk, weights + Tile<64>::kSize, queries);
  }
  const Keys out = Problem::keys(p, {forget(some_rows.first), some_rows.valid}, forget(block), forget(key_head));
  const bool first = fragment_row() < out.valid, second = fragment_row() + 8 < out.valid;
  const float factor = out_factor(p), scaled = factor * p.scale;
  const int64_t key_stride = static_cast<int64_t>(Problem::key_heads(p)) * kWidth;
  if constexpr (kSplits) {
    const int64_t size = static_cast<int64_t>(p.media) * p.latents * key_stride;
    float* parts = p.parts + 2 * block_z() * size + (out.dk - p.dk);
    store_parts<kWidth>(parts, key_stride, dk, scaled, scaled, first, second);
    store_parts<kWidth>(parts + size, key_stride, dv, factor, factor, first, second);
  } else {
    store_rows<kType, kWidth>(out.dk, key_stride, dk, scaled, scaled, first, second);
    store_rows<kType, kWidth>(out.dv, key_stride, dv, factor, factor, first, second);
  }
  if constexpr (kWritesRows) {
    const int64_t writer = kSplits ? static_cast<int64_t>(block) * p.splits + block_z() : block;
    store_partial(p.partial + (writer * Problem::key_heads(p) + key_head) * 4, delta);
  }
}

}  // namespace cuda
}  // namespace flamingo
