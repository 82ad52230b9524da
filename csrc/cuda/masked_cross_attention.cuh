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

// Clears the gradients of rows that see no medium, which no block of keys would write. A thread block has 64 rows of
// all heads: usually none is blind, and then it only reads 64 indices.
template <int kWidth>
FLAMINGO_KERNEL(kThreads, 1)
clear_blind_rows(const CrossAttentionParams p) {
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
template <Type kType, int kWidth, bool kWritesRows>
FLAMINGO_KERNEL(kThreads, backward_blocks<kWidth>(kWritesRows))
cross_attention_backward_keys(const CrossAttentionParams p) {
  using Problem = CrossAttention<kWidth>;
  backward_of_block<kType, kWidth, Problem, kWritesRows>(p, {0, 0}, block_x(), block_y(),
                                                         Problem::rows_of_block(p, block_x()));
}

}  // namespace cuda
}  // namespace flamingo
