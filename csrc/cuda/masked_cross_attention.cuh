// Defines the kernels that only flamingo::masked_cross_attention needs.
#pragma once
#include "attention_backward.cuh"

namespace flamingo {
namespace cuda {

constexpr int kPlanThreads = 1024;

// Finds the smallest range that holds the rows that see each medium. It is one thread block. Only the smallest and the
// largest row number are kept, so the result does not depend on the order of the threads.
template <class Params>
FLAMINGO_KERNEL(kPlanThreads)
plan_rows(const Params p) {
  for (int medium = thread_number(); medium < p.media; medium += kPlanThreads) {
    p.row_begin[medium] = p.rows;
    p.row_end[medium] = 0;
  }
  barrier();
  const auto seen = [&](int row) -> Range {  // media that a row sees
    if (row < 0 || row >= p.rows) return {0, 0};
    const int last = read_index(p.last_media, row);
    const int first = p.first_media.data && last >= 0 ? read_index(p.first_media, row) : last;
    return last < 0 ? Range{0, 0} : Range{first, last + 1};
  };
  for (int row = thread_number(); row < p.rows; row += kPlanThreads) {
    const Range before = seen(row - 1), here = seen(row), after = seen(row + 1);
    for (int medium = here.begin; medium < here.end; ++medium) {
      if (medium < before.begin || medium >= before.end) lower_to(p.row_begin + medium, row);
      if (medium < after.begin || medium >= after.end) raise_to(p.row_end + medium, row + 1);
    }
  }
}

// Clears the gradients of rows that see no medium, which no block of keys would write.
template <int kWidth>
FLAMINGO_DEVICE void clear_blind_rows(const CrossAttentionParams& p, int tile, int head) {
  const Rows rows = CrossAttention<kWidth>::row_tile(p, tile);
  constexpr int kChunks = kWidth / 8;
  for (int i = thread_number(); i < rows.valid * kChunks; i += kThreads) {
    const int64_t row = rows.first + i / kChunks;
    if (read_index(p.last_media, row) >= 0) continue;
    *reinterpret_cast<Chunk*>(p.dq + (row * p.heads + head) * kWidth + i % kChunks * 8) = {{0, 0, 0, 0}};
  }
}

// Gives one block of keys to a thread block. With kWritesRows the blocks after the last one clear the blind rows.
template <Type kType, int kWidth, bool kWritesRows>
FLAMINGO_KERNEL(kThreads)
cross_attention_backward_keys(const CrossAttentionParams p) {
  using Problem = CrossAttention<kWidth>;
  const int block = block_x(), blocks = p.media * Problem::blocks_of_medium(p);
  if (kWritesRows && block >= blocks) {
    clear_blind_rows<kWidth>(p, block - blocks, block_y());
    return;
  }
  backward_of_block<kType, kWidth, Problem, kWritesRows>(p, {0, 0}, block, block_y(),
                                                         Problem::rows_of_block(p, block));
}

}  // namespace cuda
}  // namespace flamingo
