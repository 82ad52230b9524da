// Handles tiles of 64 rows in shared memory, and their products. Four warps share a tile; each computes sixteen rows.
//
// A fragment of accumulators, float[columns / 8][4], holds for lane l the columns 8 n + 2 (l % 4) + {0, 1} of row
// l / 4 (elements 0, 1) and of row l / 4 + 8 (elements 2, 3).
#pragma once
#include "ptx.cuh"

namespace flamingo {
namespace cuda {

FLAMINGO_DEVICE int lane_number() { return thread_number() & 31; }
FLAMINGO_DEVICE int warp_number() { return thread_number() >> 5; }
// Returns the first of the two rows of a tile whose accumulators this thread holds; the other is eight further.
FLAMINGO_DEVICE int fragment_row() { return warp_number() * 16 + (lane_number() >> 2); }

// Locates 16-byte chunks. The row's number permutes the chunks of a row, so that eight rows of one column fall into
// different banks. The permutation covers a multiple of eight chunks, so 96 columns take the room of 128.
template <int kWidth>
struct Tile {
  static constexpr int kPitch = kWidth == 96 ? 128 : kWidth;
  static constexpr int kSize = kTile * kPitch;
  static FLAMINGO_DEVICE int offset(int row, int chunk) { return row * kPitch + ((chunk ^ (row & 7)) * 8); }
};

// Starts copying columns [8 kFirst, 8 (kFirst + kChunks)) of `valid` rows of a matrix; the other rows become zero. A
// thread copies the same column of every kStep-th row. kStep is a multiple of eight, so the permutation of the chunks
// is the same in all of them, and both addresses advance by constants.
template <int kWidth, int kFirst, int kChunks, bool kForget>
FLAMINGO_DEVICE void copy_columns(uint16_t* tile, const uint16_t* matrix, int64_t stride, int valid) {
  constexpr int kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kStep % 8 == 0, "");
  const int thread = kForget ? forget(thread_number()) : thread_number();
  const int chunk = kFirst + thread % kChunks, first = thread / kChunks;
  const uint16_t* source = matrix + first * stride + chunk * 8;
  uint16_t* target = tile + Tile<kWidth>::offset(first, chunk);
#pragma unroll
  for (int row = 0; row < kTile; row += kStep) {
    copy_16_async(target + row * Tile<kWidth>::kPitch, source, first + row < valid);
    source += kStep * stride;
  }
}

// Starts copying `valid` rows of a matrix; the other rows of the tile become zero. With kForget no register keeps the
// addresses between two calls.
template <int kWidth, bool kForget = false>
FLAMINGO_DEVICE void copy_tile(uint16_t* tile, const uint16_t* matrix, int64_t stride, int valid) {
  if constexpr (kWidth == 96) {  // twelve chunks a row do not divide the threads
    copy_columns<kWidth, 0, 8, kForget>(tile, matrix, stride, valid);
    copy_columns<kWidth, 8, 4, kForget>(tile, matrix, stride, valid);
  } else {
    copy_columns<kWidth, 0, kWidth / 8, kForget>(tile, matrix, stride, valid);
  }
}

template <int kColumns>
FLAMINGO_DEVICE void clear(float (&x)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
}

// Computes s [16 rows, 64] = a b^T for this warp's rows of tile a and all rows of tile b.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void multiply_transposed(float (&s)[8][4], const uint16_t* a, const uint16_t* b) {
  const int lane = lane_number();
  clear(s);
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    uint32_t left[4];
    load_matrices(left, a + Tile<kWidth>::offset(warp_number() * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t right[4];
      load_matrices(right, b + Tile<kWidth>::offset(n * 16 + (lane & 7) + ((lane >> 4) << 3),
                                                    k * 2 + ((lane >> 3) & 1)));
      multiply<kType>(s[2 * n], left, right[0], right[1]);
      multiply<kType>(s[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// Packs the columns [16 k, 16 k + 16) of accumulators as the left operand of a product.
template <Type kType>
FLAMINGO_DEVICE void pack_rows(uint32_t (&left)[4], const float (&w)[8][4], int k) {
  left[0] = pack<kType>(w[2 * k][0], w[2 * k][1]);
  left[1] = pack<kType>(w[2 * k][2], w[2 * k][3]);
  left[2] = pack<kType>(w[2 * k + 1][0], w[2 * k + 1][1]);
  left[3] = pack<kType>(w[2 * k + 1][2], w[2 * k + 1][3]);
}

// Computes sum [16 rows, kWidth] += w [16 rows, 64] * b [64, kWidth]; w are accumulators of this warp.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void accumulate_rows(float (&sum)[kWidth / 8][4], const float (&w)[8][4], const uint16_t* b) {
  const int lane = lane_number();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t left[4];
    pack_rows<kType>(left, w, k);
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, b + Tile<kWidth>::offset(k * 16 + (lane & 15), n * 2 + (lane >> 4)));
      multiply<kType>(sum[2 * n], left, right[0], right[1]);
      multiply<kType>(sum[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// Writes this warp's accumulators [16 rows, 64] into a tile of 64 columns.
template <Type kType>
FLAMINGO_DEVICE void store_weights(uint16_t* tile, const float (&w)[8][4]) {
  const int row = fragment_row(), column = (lane_number() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    store_word(tile + Tile<64>::offset(row, n) + column, pack<kType>(w[n][0], w[n][1]));
    store_word(tile + Tile<64>::offset(row + 8, n) + column, pack<kType>(w[n][2], w[n][3]));
  }
}

// Computes sum [16 keys, kWidth] += w^T b for this warp's sixteen columns of w [64, 64]; b is [64, kWidth]. With kForget
// no register keeps the addresses between two calls.
template <Type kType, int kWidth, bool kForget = false>
FLAMINGO_DEVICE void accumulate_keys(float (&sum)[kWidth / 8][4], const uint16_t* w, const uint16_t* b) {
  const int lane = kForget ? forget(lane_number()) : lane_number();
#pragma unroll 2
  for (int k = 0; k < 4; ++k) {
    uint32_t left[4];
    load_matrices_transposed(left, w + Tile<64>::offset(k * 16 + (lane & 7) + ((lane >> 4) << 3),
                                                        warp_number() * 2 + ((lane >> 3) & 1)));
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, b + Tile<kWidth>::offset(k * 16 + (lane & 15), n * 2 + (lane >> 4)));
      multiply<kType>(sum[2 * n], left, right[0], right[1]);
      multiply<kType>(sum[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// Returns the sum, or maximum, over the four lanes that hold a row.
FLAMINGO_DEVICE float sum_of_row(float x) {
  x += exchange(x, 1);
  return x + exchange(x, 2);
}
FLAMINGO_DEVICE float max_of_row(float x) {
  x = fmaxf(x, exchange(x, 1));
  return fmaxf(x, exchange(x, 2));
}

// Gives lane i of four consecutive lanes the words i of all four.
FLAMINGO_DEVICE void transpose_words(uint32_t (&words)[4]) {
  const int lane = lane_number();
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t received = exchange(upper ? words[i] : words[i + distance], distance);
      if (upper) words[i] = received;
      else words[i + distance] = received;
    }
  }
}

// Writes this warp's accumulators times `factor` to memory, in pieces of 64 bytes: row r of the tile to
// `matrix + r * stride`. `write_first` and `write_second` say whether this thread's two rows exist.
template <Type kType, int kWidth>
FLAMINGO_DEVICE void store_rows(uint16_t* matrix, int64_t stride, const float (&x)[kWidth / 8][4], float factor_first,
                                float factor_second, bool write_first, bool write_second) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? factor_second : factor_first;
    uint16_t* row = matrix + (fragment_row() + half * 8) * stride + (lane_number() & 3) * 8;
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 4) {
      Chunk chunk;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        chunk.words[i] = pack<kType>(x[n + i][half * 2] * factor, x[n + i][half * 2 + 1] * factor);
      transpose_words(chunk.words);
      if (half ? write_second : write_first) *reinterpret_cast<Chunk*>(row + n * 8) = chunk;
    }
  }
}

// Writes this warp's accumulators times `factor` to a matrix of float32, as store_rows does.
template <int kWidth>
FLAMINGO_DEVICE void store_parts(float* matrix, int64_t stride, const float (&x)[kWidth / 8][4], float factor_first,
                                 float factor_second, bool write_first, bool write_second) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? factor_second : factor_first;
    float* row = matrix + (fragment_row() + half * 8) * stride + (lane_number() & 3) * 2;
    if (!(half ? write_second : write_first)) continue;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
      *reinterpret_cast<TwoFloats*>(row + n * 8) = {{x[n][half * 2] * factor, x[n][half * 2 + 1] * factor}};
  }
}

constexpr int kPartsAtOnce = 4;  // that a thread reads before it adds them

// Reads eight numbers of a part that one of several thread blocks wrote, or zeros where there is no such part. `stride`
// numbers lie between the parts.
FLAMINGO_DEVICE void load_part(FourFloats& low, FourFloats& high, const float* parts, int64_t stride, int split,
                               int splits) {
  low = high = {{0.0f, 0.0f, 0.0f, 0.0f}};
  if (split >= splits) return;
  const FourFloats* part = reinterpret_cast<const FourFloats*>(parts + split * stride);
  low = part[0];
  high = part[1];
}

// Adds the parts in their order. A thread has eight numbers.
template <Type kType>
FLAMINGO_DEVICE void sum_parts(uint16_t* out, const float* parts, int64_t stride, int splits) {
  float sum[8] = {};
  for (int first = 0; first < splits; first += kPartsAtOnce) {
    FourFloats low[kPartsAtOnce], high[kPartsAtOnce];
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) load_part(low[i], high[i], parts, stride, first + i, splits);
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k] += low[i].values[k];
        sum[k + 4] += high[i].values[k];
      }
  }
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.words[i] = pack<kType>(sum[2 * i], sum[2 * i + 1]);
  *reinterpret_cast<Chunk*>(out) = chunk;
}

}  // namespace cuda
}  // namespace flamingo
