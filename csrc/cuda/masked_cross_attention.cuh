// Defines the kernels that only flamingo::masked_cross_attention needs.
#pragma once
#include "attention_backward.cuh"

namespace flamingo {
namespace cuda {

constexpr int kPlanThreads = 256;

// Starts the ranges of `plan_rows` as empty.
template <class Params>
FLAMINGO_KERNEL(kPlanThreads, 1)
empty_ranges(const Params p) {
  const int medium = block_x() * kPlanThreads + thread_number();
  if (medium >= p.media) return;
  p.row_begin[medium] = p.rows;
  p.row_end[medium] = 0;
}

// Finds the smallest range that holds the rows that see each medium; a thread looks at one row. Only the smallest and
// the largest row number are kept, so the result does not depend on the order of the threads. The ranges depend on the
// index alone, so one launch serves the backwards of all layers.
template <class Params>
FLAMINGO_KERNEL(kPlanThreads, 1)
plan_rows(const Params p) {
  const int row = block_x() * kPlanThreads + thread_number();
  if (row >= p.rows) return;
  const auto seen = [&](int at) -> Range {  // media that a row sees
    if (at < 0 || at >= p.rows) return {0, 0};
    const int last = read_index(p.last_media, at);
    const int first = p.first_media.data && last >= 0 ? read_index(p.first_media, at) : last;
    FLAMINGO_ASSERT(last >= -1 && last < p.media && "media_index is out of range");
    FLAMINGO_ASSERT((last < 0 || (first >= 0 && first <= last)) && "first_media is out of range");
    return last < 0 ? Range{0, 0} : Range{first, last + 1};
  };
  const Range before = seen(row - 1), here = seen(row), after = seen(row + 1);
  for (int medium = here.begin; medium < here.end; ++medium) {
    if (medium < before.begin || medium >= before.end) lower_to(p.row_begin + medium, row);
    if (medium < after.begin || medium >= after.end) raise_to(p.row_end + medium, row + 1);
  }
}

// Whether the thread blocks with the most rows start first: in the backward by one kernel, where it does not spill.
template <int kWidth, bool kWritesRows>
constexpr bool kLongestFirst = kWidth == 64 && kWritesRows;

// Orders the media by the rows that may see them, longest first, so that no thread block with much work starts last. A
// warp finds the place of a medium. With many media no order pays.
FLAMINGO_DEVICE void order_media(const CrossAttentionParams& p) {
  constexpr int kMostMedia = 1024;
  const auto rows_of = [&](int medium) { return max(0, p.row_end[medium] - p.row_begin[medium]); };
  const int warps = kThreads / 32 * max(1, (p.rows + kTile - 1) / kTile);
  for (int medium = block_x() * (kThreads / 32) + warp_number(); medium < p.media; medium += warps) {
    uint32_t place = 0;  // media before this one
    const int mine = rows_of(medium);
    for (int other = lane_number(); other < p.media && p.media <= kMostMedia; other += 32)
      place += rows_of(other) > mine || (rows_of(other) == mine && other < medium);
    for (int distance = 16; distance > 0; distance /= 2) place += exchange(place, distance);
    if (lane_number() == 0) p.order[p.media <= kMostMedia ? static_cast<int>(place) : medium] = medium;
  }
}

// Orders the media, and clears the gradients of rows that see no medium, which no block of keys would write. A thread
// block has 64 rows of all heads: usually none is blind, and then it only reads 64 indices.
template <int kWidth>
FLAMINGO_KERNEL(kThreads, 1)
clear_blind_rows(const CrossAttentionParams p) {
  if constexpr (kLongestFirst<kWidth, true>) order_media(p);
  const Rows rows = CrossAttention<kWidth>::row_tile(p, block_x());
  const int chunks = p.heads * (kWidth / 8);
  for (int i = warp_number(); i < rows.valid; i += kThreads / 32) {
    const int64_t row = rows.first + i;
    if (read_index(p.last_media, row) >= 0) continue;
    for (int chunk = lane_number(); chunk < chunks; chunk += 32)
      *reinterpret_cast<Chunk*>(p.dq + row * p.heads * kWidth + chunk * 8) = {{0, 0, 0, 0}};
  }
}

// Gives one block of keys to a thread block. With kWritesRows it also writes dQ of the rows that see the block.
// With kSplits several thread blocks share the rows.
template <Type kType, int kWidth, bool kWritesRows, bool kSplits = false>
FLAMINGO_KERNEL(kThreads, backward_blocks<kWidth>(kWritesRows))
cross_attention_backward_keys(const CrossAttentionParams p) {
  using Problem = CrossAttention<kWidth>;
  int block = block_x(), key_head = block_y();
  if constexpr (kLongestFirst<kWidth, kWritesRows>) {  // all heads of a medium follow each other
    block = p.order[block_y()];   // a block of keys is a medium
    key_head = block_x();
  }
  Range range = Problem::rows_of_block(p, block);
  if constexpr (kSplits) range = share_of_rows(range, block_z(), p.splits);
  backward_of_block<kType, kWidth, Problem, kWritesRows, kSplits>(p, {0, 0}, block, key_head, range);
}

// Adds the parts of dK (y = 0) and dV of a backward with splits.
template <Type kType, int kWidth>
FLAMINGO_KERNEL(kThreads, 4)
sum_key_parts(const CrossAttentionParams p) {
  const int64_t size = static_cast<int64_t>(p.media) * p.latents * p.key_heads * kWidth;
  const int64_t at = (static_cast<int64_t>(block_x()) * kThreads + thread_number()) * 8;
  if (at < size) sum_parts<kType>((block_y() ? p.dv : p.dk) + at, p.parts + block_y() * size + at, 2 * size, p.splits);
}

}  // namespace cuda
}  // namespace flamingo
