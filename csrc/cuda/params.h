// Defines the arguments of the kernels: plain structs that the bindings fill and the kernels read.
//
// 16-bit tensors are pointers to uint16_t whatever their type. Strides are in elements; the last dimension is
// contiguous, rows start at multiples of 16 bytes. Outputs are contiguous.
#pragma once
#include <stdint.h>

namespace flamingo {
namespace cuda {

enum class Type { kBFloat16, kFloat16 };

constexpr int kThreads = 128;  // of a block: four warps of sixteen rows (or keys) each
constexpr int kTile = 64;      // query rows, or keys, handled together

struct Grid {  // thread blocks of a launch: block_x, block_y and block_z count to these
  int64_t blocks;
  int heads;
  int splits = 1;  // blocks that share the work of one
};

struct Index {  // an index tensor of int32 or int64
  const void* data;
  int wide;  // int64 if not 0, else int32
};

// Query rows: [rows, heads, width].
struct AttentionParams {
  const uint16_t* q;
  const uint16_t* grad;  // of the output; backward
  const uint16_t* o;     // the output; backward of the resampler
  uint16_t* out;         // forward
  uint16_t* dq;          // backward
  float* lse;            // [rows, heads]; written by the forward of the resampler and by the backward over rows
  float* delta;          // [rows, heads]: sum of output * gradient of a row; backward
  float* partial;        // [blocks * heads, 4]: sums of delta, one a warp; backward of the cross-attention
  const float* out_scale;  // factor of the output, or null
  int64_t q_row, q_head;
  int64_t grad_row, grad_head;
  int rows, heads;
  float scale;
};

// Keys: [media, latents, key_heads, width].
struct CrossAttentionParams : AttentionParams {
  const uint16_t *k, *v;
  uint16_t *dk, *dv;
  int64_t k_medium, k_latent, k_head;
  int64_t v_medium, v_latent, v_head;
  int media, latents;
  int key_heads;      // heads of the keys and values
  int shared_by;      // heads of the queries that share one of them: heads / key_heads
  Index last_media;   // [rows], -1: none
  Index first_media;  // [rows]; data is null in the mode "one medium"
  int* row_begin;     // [media]: the rows that see a medium lie in row_begin..row_end; backward
  int* row_end;
  int* order;    // [media]: longest first; backward by one kernel
  int splits;    // thread blocks that share the rows of a key block in the backward, at least 1
  float* parts;  // [splits, 2, media, latents, key_heads, width]: their gradients of k and v
};

// Returns whether a row attends to one block of keys only. Then one kernel computes the whole backward.
inline bool one_block_a_row(const CrossAttentionParams& p) {
  return p.first_media.data == nullptr && p.latents <= kTile;
}

// Keys: features [features, heads, width] and latents [media, latents, heads, width]. There are media * latents rows.
struct ResamplerParams : AttentionParams {
  const uint16_t *k_features, *v_features, *k_latents, *v_latents;
  uint16_t *dk_features, *dv_features, *dk_latents, *dv_latents;
  int64_t k_features_row, k_features_head, v_features_row, v_features_head;
  int64_t k_latents_row, k_latents_head, v_latents_row, v_latents_head;
  int media, latents, features;
  Index cu_media;  // [media + 1]
  int splits;       // thread blocks that share the keys of a row tile, at least 1
  float* parts;     // [splits, rows, heads, width]: their outputs, or gradients of q
  float* part_lse;  // [splits, rows, heads]; forward
};

// Returns how many thread blocks shall share the work of one. It depends on shapes alone, so that all cards add
// the same parts. `blocks`: blocks without a split; `visits`: tiles that one of them visits on average.
inline int wanted_splits(int64_t blocks, int64_t visits) {
  constexpr int64_t kEnoughBlocks = 384;  // about three for each multiprocessor of an H100
  constexpr int64_t kFewestVisits = 4;    // fewer would not pay for the sum of the parts
  if (blocks == 0 || blocks >= kEnoughBlocks) return 1;
  const int64_t most = visits / kFewestVisits, wanted = (kEnoughBlocks + blocks - 1) / blocks;
  return static_cast<int>(most < 2 ? 1 : wanted < most ? wanted : most);
}

// A row tile of all heads that share a key block goes to one thread block, so there are no more splits than row tiles.
inline int wanted_splits(const CrossAttentionParams& p) {
  if (p.media == 0) return 1;
  const int64_t key_blocks = static_cast<int64_t>(p.media) * ((p.latents + kTile - 1) / kTile);
  const int64_t tiles = p.rows / p.media / kTile;  // of a medium, where a row sees one
  const int wanted = wanted_splits(key_blocks * p.key_heads, tiles * p.shared_by);
  return static_cast<int>(tiles < 2 ? 1 : wanted < tiles ? wanted : tiles);
}

inline int wanted_splits(const ResamplerParams& p) {
  const int64_t tiles = (p.latents + kTile - 1) / kTile;
  if (p.media == 0) return 1;
  return wanted_splits(p.media * tiles * p.heads, p.features / p.media / kTile + tiles);
}

}  // namespace cuda
}  // namespace flamingo
