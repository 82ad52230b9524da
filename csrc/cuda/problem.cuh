// Describes the two ops to the kernels: where the keys of a block are, and which rows see them.
#pragma once
#include "tile.cuh"

namespace flamingo {
namespace cuda {

FLAMINGO_DEVICE int read_index(const Index& index, int64_t i) {
  return index.wide ? static_cast<int>(static_cast<const int64_t*>(index.data)[i])
                    : static_cast<const int32_t*>(index.data)[i];
}

struct Range {
  int begin, end;
};

// Returns the share of one of several thread blocks. The first ones have one more where it does not come out even.
FLAMINGO_DEVICE Range share_of(const Range& all, int split, int splits) {
  const int each = (all.end - all.begin) / splits, more = (all.end - all.begin) % splits;
  const int begin = all.begin + split * each + min(split, more);
  return {begin, begin + each + (split < more)};
}

// Does the same with the tiles of a range of rows, which may be empty.
FLAMINGO_DEVICE Range share_of_rows(const Range& all, int split, int splits) {
  const Range tiles = share_of({0, (max(0, all.end - all.begin) + kTile - 1) / kTile}, split, splits);
  return {all.begin + tiles.begin * kTile, min(all.end, all.begin + tiles.end * kTile)};
}

// Up to 64 keys, of one head.
struct Keys {
  const uint16_t *k, *v;
  int64_t k_stride, v_stride;
  uint16_t *dk, *dv;  // contiguous [keys, key heads, width]
  int valid;
};

// Up to 64 consecutive query rows.
struct Rows {
  int first, valid;
};

struct Visible {  // key blocks that the two rows of a thread see
  Range first, second;
  FLAMINGO_DEVICE bool sees_first(int block) const { return first.begin <= block && block < first.end; }
  FLAMINGO_DEVICE bool sees_second(int block) const { return second.begin <= block && block < second.end; }
};

// Masked cross-attention: key block b is block b % blocks of medium b / blocks. Each row sees a run of media.
template <int kWidth>
struct CrossAttention {
  typedef CrossAttentionParams Params;
  static constexpr bool kSavesStatistics = false;  // the forward saves nothing for the backward

  // The head of the keys that a head of the queries attends to. Neighbors share one.
  static FLAMINGO_DEVICE int key_head(const Params& p, int head) { return head / p.shared_by; }
  static FLAMINGO_DEVICE int key_heads(const Params& p) { return p.key_heads; }
  static FLAMINGO_DEVICE int shared_by(const Params& p) { return p.shared_by; }

  static FLAMINGO_DEVICE int blocks_of_medium(const Params& p) { return (p.latents + kTile - 1) / kTile; }

  static FLAMINGO_DEVICE Rows row_tile(const Params& p, int tile) {
    return {tile * kTile, min(kTile, p.rows - tile * kTile)};
  }

  static FLAMINGO_DEVICE Range blocks_of_row(const Params& p, const Rows& rows, int row) {
    if (row >= rows.valid) return {0, 0};
    const int last = read_index(p.last_media, rows.first + row);
    const int first = p.first_media.data && last >= 0 ? read_index(p.first_media, rows.first + row) : last;
    FLAMINGO_CHECK(last >= -1 && last < p.media && "media_index is out of range");
    FLAMINGO_CHECK((last < 0 || (first >= 0 && first <= last)) && "first_media is out of range");
    return last < 0 ? Range{0, 0} : Range{first * blocks_of_medium(p), (last + 1) * blocks_of_medium(p)};
  }

  static FLAMINGO_DEVICE Visible visible(const Params& p, const Rows& rows) {
    return {blocks_of_row(p, rows, fragment_row()), blocks_of_row(p, rows, fragment_row() + 8)};
  }

  // Range of the blocks that some row of the tile sees.
  static FLAMINGO_DEVICE Range blocks_of_tile(const Params& p, const Rows& rows) {
    const Range a = blocks_of_row(p, rows, lane_number()), b = blocks_of_row(p, rows, lane_number() + 32);
    const int none = 0x7fffffff;
    const int low = min(a.begin < a.end ? a.begin : none, b.begin < b.end ? b.begin : none);
    const int begin = smallest_lane(low), end = largest_lane(max(a.end, b.end));
    return {begin < end ? begin : end, end};
  }

  static FLAMINGO_DEVICE Keys keys(const Params& p, const Rows&, int block, int key_head) {
    const int medium = block / blocks_of_medium(p), first = block % blocks_of_medium(p) * kTile;
    const int64_t out = ((static_cast<int64_t>(medium) * p.latents + first) * p.key_heads + key_head) * kWidth;
    return {p.k + medium * p.k_medium + first * p.k_latent + key_head * p.k_head,
            p.v + medium * p.v_medium + first * p.v_latent + key_head * p.v_head,
            p.k_latent,
            p.v_latent,
            p.dk + out,
            p.dv + out,
            min(kTile, p.latents - first)};
  }

  // Walks the blocks that some row of the tile sees, for the forward: it adds where `keys` divides, and reads the
  // indices of the tile together. The backwards would spill with it.
  struct Walk {
    const Params& p;
    const uint16_t *k, *v;  // of this block
    int medium, first;      // this block: its medium, and its first latent
    int left;               // blocks that are not done
    Range seen_by_first, seen_by_second;  // media that the two rows of a thread see

    FLAMINGO_DEVICE Walk(const Params& params, const Rows& rows, int key_head) : p(params), first(0) {
      // Rows that do not exist are as the last one, which changes no range.
      const int in_tile[4] = {fragment_row(), fragment_row() + 8, lane_number(), lane_number() + 32};
      int row[4], begin[4], end[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[i] = rows.first + min(in_tile[i], rows.valid - 1);
        begin[i] = read_index(p.last_media, row[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) end[i] = begin[i] + 1;
      if (p.first_media.data) {
#pragma unroll
        for (int i = 0; i < 4; ++i) begin[i] = read_index(p.first_media, row[i]);
      }
      int low = 0x7fffffff;
#pragma unroll
      for (int i = 2; i < 4; ++i) {
        FLAMINGO_CHECK(end[i] >= 0 && end[i] <= p.media && "media_index is out of range");
        FLAMINGO_CHECK((end[i] == 0 || (begin[i] >= 0 && begin[i] < end[i])) && "first_media is out of range");
        low = min(low, end[i] > 0 ? begin[i] : low);
      }
      seen_by_first = {begin[0], end[0]};
      seen_by_second = {begin[1], end[1]};
      medium = smallest_lane(low);
      left = max(0, largest_lane(max(end[2], end[3])) - medium) * blocks_of_medium(p);
      k = p.k + medium * p.k_medium + key_head * p.k_head;
      v = p.v + medium * p.v_medium + key_head * p.v_head;
    }

    FLAMINGO_DEVICE int valid() const { return min(kTile, p.latents - first); }
    FLAMINGO_DEVICE bool sees_first() const { return seen_by_first.begin <= medium && medium < seen_by_first.end; }
    FLAMINGO_DEVICE bool sees_second() const { return seen_by_second.begin <= medium && medium < seen_by_second.end; }
    FLAMINGO_DEVICE Keys keys() const { return {k, v, p.k_latent, p.v_latent, nullptr, nullptr, valid()}; }
    FLAMINGO_DEVICE void advance() {
      --left;
      const bool same_medium = first + kTile < p.latents;
      k += same_medium ? kTile * p.k_latent : p.k_medium - first * p.k_latent;
      v += same_medium ? kTile * p.v_latent : p.v_medium - first * p.v_latent;
      medium += !same_medium;
      first = same_medium ? first + kTile : 0;
    }
  };

  // Range that holds the rows that see a block.
  static FLAMINGO_DEVICE Range rows_of_block(const Params& p, int block) {
    const int medium = block / blocks_of_medium(p);
    return {p.row_begin[medium], p.row_end[medium]};
  }
};

// Resampler attention: the blocks of a medium are those of its features, then those of its latents.
template <int kWidth>
struct ResamplerAttention {
  typedef ResamplerParams Params;
  static constexpr bool kSavesStatistics = true;

  static FLAMINGO_DEVICE int key_head(const Params&, int head) { return head; }
  static FLAMINGO_DEVICE int key_heads(const Params& p) { return p.heads; }
  static FLAMINGO_DEVICE int shared_by(const Params&) { return 1; }

  static FLAMINGO_DEVICE int tiles_of_medium(const Params& p) { return (p.latents + kTile - 1) / kTile; }

  static FLAMINGO_DEVICE Rows row_tile(const Params& p, int tile) {
    const int medium = tile / tiles_of_medium(p), first = tile % tiles_of_medium(p) * kTile;
    return {medium * p.latents + first, min(kTile, p.latents - first)};
  }

  static FLAMINGO_DEVICE Range features_of(const Params& p, int medium) {
    return {read_index(p.cu_media, medium), read_index(p.cu_media, medium + 1)};
  }

  static FLAMINGO_DEVICE Range blocks_of_tile(const Params& p, const Rows& rows) {
    const Range features = features_of(p, rows.first / p.latents);
    FLAMINGO_CHECK(features.begin >= 0 && features.begin <= features.end && features.end <= p.features &&
                   "cu_media is out of range or decreases");
    return {0, (features.end - features.begin + kTile - 1) / kTile + tiles_of_medium(p)};
  }

  static FLAMINGO_DEVICE Visible visible(const Params& p, const Rows& rows) {
    const Range all = {0, 0x7fffffff}, none = {0, 0};
    return {fragment_row() < rows.valid ? all : none, fragment_row() + 8 < rows.valid ? all : none};
  }

  static FLAMINGO_DEVICE Keys keys(const Params& p, const Rows& rows, int block, int head) {
    const int medium = rows.first / p.latents;
    const Range features = features_of(p, medium);
    const int feature_blocks = (features.end - features.begin + kTile - 1) / kTile;
    if (block < feature_blocks) {
      const int64_t first = features.begin + block * kTile;
      const int64_t out = (first * p.heads + head) * kWidth;
      return {p.k_features + first * p.k_features_row + head * p.k_features_head,
              p.v_features + first * p.v_features_row + head * p.v_features_head,
              p.k_features_row,
              p.v_features_row,
              p.dk_features + out,
              p.dv_features + out,
              min(kTile, features.end - static_cast<int>(first))};
    }
    const int in_medium = (block - feature_blocks) * kTile;
    const int64_t first = static_cast<int64_t>(medium) * p.latents + in_medium;
    const int64_t out = (first * p.heads + head) * kWidth;
    return {p.k_latents + first * p.k_latents_row + head * p.k_latents_head,
            p.v_latents + first * p.v_latents_row + head * p.v_latents_head,
            p.k_latents_row,
            p.v_latents_row,
            p.dk_latents + out,
            p.dv_latents + out,
            min(kTile, p.latents - in_medium)};
  }

  // Walks the blocks of a medium, for the forward, as that of the cross-attention does.
  struct Walk {
    const Params& p;
    int head, row;     // row: the first latent of the medium
    int feature, end;  // the first feature of this block, and the end of the medium; the blocks after it hold latents
    int after;         // where the numbers of features would go on as those of latents
    int left;          // blocks that are not done
    bool exists_first, exists_second;

    FLAMINGO_DEVICE Walk(const Params& params, const Rows& rows, int of_head) : p(params), head(of_head) {
      const int medium = rows.first / p.latents;
      const Range features = features_of(p, medium);
      FLAMINGO_CHECK(features.begin >= 0 && features.begin <= features.end && features.end <= p.features &&
                     "cu_media is out of range or decreases");
      const int blocks = (features.end - features.begin + kTile - 1) / kTile;
      row = medium * p.latents;
      feature = features.begin;
      end = features.end;
      after = features.begin + blocks * kTile;
      left = blocks + tiles_of_medium(p);
      exists_first = fragment_row() < rows.valid;
      exists_second = fragment_row() + 8 < rows.valid;
    }

    // Leaves the share of one of several thread blocks.
    FLAMINGO_DEVICE void take(int split, int splits) {
      const Range share = share_of({0, left}, split, splits);
      left = share.end - share.begin;
      feature += share.begin * kTile;
    }
    FLAMINGO_DEVICE int valid() const { return min(kTile, feature < end ? end - feature : p.latents - (feature - after)); }
    FLAMINGO_DEVICE bool sees_first() const { return exists_first; }
    FLAMINGO_DEVICE bool sees_second() const { return exists_second; }
    FLAMINGO_DEVICE Keys keys() const {
      if (feature < end)
        return {p.k_features + feature * p.k_features_row + head * p.k_features_head,
                p.v_features + feature * p.v_features_row + head * p.v_features_head,
                p.k_features_row,
                p.v_features_row,
                nullptr,
                nullptr,
                valid()};
      const int latent = row + feature - after;
      return {p.k_latents + latent * p.k_latents_row + head * p.k_latents_head,
              p.v_latents + latent * p.v_latents_row + head * p.v_latents_head,
              p.k_latents_row,
              p.v_latents_row,
              nullptr,
              nullptr,
              valid()};
    }
    FLAMINGO_DEVICE void advance() {
      --left;
      feature += kTile;
    }
  };
};

// Locates one of the key blocks of all media. Features of medium m start at slot cu_media[m] / 64 + m, which leaves
// room for a last block that is not full; the latents follow. A slot may be empty (valid <= 0).
struct Slot {
  int medium, block;
  bool exists;
};
FLAMINGO_DEVICE Slot find_slot(const ResamplerParams& p, int slot) {
  const int tiles = (p.latents + kTile - 1) / kTile;
  const int feature_slots = p.features / kTile + p.media;
  if (slot >= feature_slots) {
    const int medium = (slot - feature_slots) / tiles;
    const int length = read_index(p.cu_media, medium + 1) - read_index(p.cu_media, medium);
    return {medium, (length + kTile - 1) / kTile + (slot - feature_slots) % tiles, true};
  }
  int low = 0, high = p.media - 1;  // the last medium that starts at or before the slot
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (read_index(p.cu_media, middle) / kTile + middle <= slot) low = middle;
    else high = middle - 1;
  }
  const int begin = read_index(p.cu_media, low);
  const int block = slot - (begin / kTile + low);
  return {low, block, begin + block * kTile < read_index(p.cu_media, low + 1)};
}

}  // namespace cuda
}  // namespace flamingo
