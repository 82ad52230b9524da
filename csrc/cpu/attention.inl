// Computes forward and backward of one group, for all instruction sets and both kinds of arithmetic.
//
// A tile of up to 64 query rows attends to the keys in blocks of 64. All scores of the tile are kept, so the softmax
// of a whole row is exact, and the backward needs no statistics of the forward.

template <class Operands, class Stored>
struct Attention {
  typedef typename Operands::Element Element;
  static constexpr int64_t kDepth = Operands::kDepth;

  static int64_t row_number(const Group& group, int64_t r) { return group.rows ? group.rows[r] : r; }

  // `offset`: elements before the head in the matrix.
  static void gather(const Stored** pointers, const void* base, int64_t offset, int64_t stride, const Group& group,
                     int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      pointers[r] = static_cast<const Stored*>(base) + offset + row_number(group, first + r) * stride;
    }
  }

  // Numbers the tiles of rows: those of one head, then those of the next one that shares the keys.
  struct TileNumber {
    int64_t head, first;
    TileNumber next(const Group& group) const {
      return first + kTileRows < group.row_count ? TileNumber{head, first + kTileRows} : TileNumber{head + 1, 0};
    }
  };

  static int64_t gather_keys(const Stored** pointers, const Group& group, int64_t block, bool values) {
    const int64_t first = block * kBlockKeys;
    const int64_t left = group.key_count() - first;
    const int64_t count = left < kBlockKeys ? left : kBlockKeys;
    for (int64_t j = 0; j < count; ++j) pointers[j] = key_row<Stored>(group, first + j, values);
    return count;
  }

  static int64_t columns_of(const Group& group, int64_t block) {
    const int64_t left = group.key_count() - block * kBlockKeys;
    return left >= kBlockKeys ? kBlockKeys : (left + 15) / 16 * 16;
  }

  // Range of blocks that some row of the tile sees.
  struct Range {
    int64_t begin, end;
  };
  static Range visible_blocks(const Group& group, int64_t first, int64_t count) {
    if (!group.key_begin) return {0, group.block_count()};
    int64_t low = group.key_begin[first], high = group.key_end[first];
    for (int64_t r = first + 1; r < first + count; ++r) {
      low = group.key_begin[r] < low ? group.key_begin[r] : low;
      high = group.key_end[r] > high ? group.key_end[r] : high;
    }
    return {low / kBlockKeys, (high + kBlockKeys - 1) / kBlockKeys};
  }

  // Whether a row sees every key of a block, and the block is full.
  static bool sees_block(const Group& group, int64_t row, int64_t block) {
    const int64_t begin = group.key_begin ? group.key_begin[row] : 0;
    const int64_t end = group.key_begin ? group.key_end[row] : group.key_count();
    return begin <= block * kBlockKeys && (block + 1) * kBlockKeys <= end;
  }

  struct RowSum {
    float largest, total;  // largest scaled score, sum of the exponentials relative to it
  };

  // Replaces the scores of one row by exponentials relative to the largest; those of keys that the row does not see
  // are 0.
  static RowSum exponentials_of_row(const Group& group, float* scores, int64_t row, int64_t r, Range blocks) {
    const int64_t begin = group.key_begin ? group.key_begin[row] : 0;
    const int64_t end = group.key_begin ? group.key_end[row] : group.key_count();
    const Vec lowest = splat(-3.0e38f);
    Vec largest = lowest;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      float* s = scores + (b * kTileRows + r) * kBlockKeys;
      const bool whole = sees_block(group, row, b);
      for (int64_t j = 0; j < kBlockKeys; j += kLanes) {
        Vec x = load(s + j);
        if (!whole) {
          const VecInt key = lane_numbers() + static_cast<int32_t>(b * kBlockKeys + j);
          x = ((key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end))) ? x : lowest;
          store(s + j, x);
        }
        largest = maximum(largest, x);
      }
    }
    const float top = max_lanes(largest);
    Vec sums = {};
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      float* s = scores + (b * kTileRows + r) * kBlockKeys;
      for (int64_t j = 0; j < kBlockKeys; j += kLanes) {
        const Vec x = load(s + j);
        const Vec e = x == lowest ? Vec{} : exp_nonpositive((x - splat(top)) * splat(group.scale));
        store(s + j, e);
        sums += e;
      }
    }
    return {top * group.scale, sum_lanes(sums)};
  }

  static float log_sum(RowSum sum) { return sum.largest + __builtin_logf(sum.total); }

  // Computes the softmax weights of one row.
  static void softmax_row(const Group& group, float* scores, int64_t row, int64_t r, Range blocks) {
    const Vec inverse = splat(1.0f / exponentials_of_row(group, scores, row, r, blocks).total);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      float* s = scores + (b * kTileRows + r) * kBlockKeys;
      for (int64_t j = 0; j < kBlockKeys; j += kLanes) store(s + j, load(s + j) * inverse);
    }
  }

  // Returns whether the next block of a row tile is added to `sums`, or starts new ones after a run of blocks. The sums of
  // a finished run are moved to `earlier`.
  static bool continues_sum(const float* sums, float* earlier, int64_t count, int64_t block) {
    if (block % kSummedBlocks) return true;
    for (int64_t i = 0; block > 0 && i < count; i += kLanes) {
      const Vec run = load(sums + i);
      store(earlier + i, block > kSummedBlocks ? load(earlier + i) + run : run);
    }
    return false;
  }

  static void add_earlier(float* sums, const float* earlier, int64_t count, Range blocks) {
    if (blocks.end - blocks.begin <= kSummedBlocks) return;
    for (int64_t i = 0; i < count; i += kLanes) store(sums + i, load(earlier + i) + load(sums + i));
  }

  // The factor of row r is factors[r].
  static void store_rows(const Group& group, const float* values, int64_t head, int64_t first, int64_t count,
                         const float* factors) {
    const int64_t width = group.width;
    for (int64_t r = 0; r < count; ++r) {
      Stored* out = static_cast<Stored*>(group.out) + head * group.out_head +
                    row_number(group, first + r) * group.out_stride;
      const Vec factor = splat(factors[r]);
      for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(values + r * width + d) * factor);
    }
  }

  struct Scratch {
    char* next;
    template <class T>
    T* take(int64_t count) {
      T* p = reinterpret_cast<T*>(next);
      next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
      return p;
    }
  };

  static void forward(const Group& group, void* memory) {
    const int64_t width = group.width, blocks = group.block_count(), packed = kBlockKeys * width / kDepth;
    Scratch scratch{static_cast<char*>(memory)};
    Element* keys = scratch.template take<Element>(blocks * packed);
    Element* values = scratch.template take<Element>(blocks * packed);
    Element* queries = scratch.template take<Element>(packed);
    float* scores = scratch.template take<float>(blocks * kTileRows * kBlockKeys);
    float* sums = scratch.template take<float>(kTileRows * width);
    float* earlier = scratch.template take<float>(kTileRows * width);
    float* converted = scratch.template take<float>(kTileRows * kBlockKeys);
    const Stored* pointers[kBlockKeys];
    float factors[kTileRows];

    for (int64_t b = 0; b < blocks && group.row_count > 0; ++b) {
      const int64_t count = gather_keys(pointers, group, b, false);
      Operands::pack_transposed(keys + b * packed, pointers, count, width);
      gather_keys(pointers, group, b, true);
      Operands::pack_stacked(values + b * packed, pointers, count, width);
    }
    for (TileNumber tile = {0, 0}; tile.head < group.heads && group.row_count > 0; tile = tile.next(group)) {
      const int64_t first = tile.first, left = group.row_count - first, count = left < kTileRows ? left : kTileRows;
      const Range range = visible_blocks(group, first, count);
      gather(pointers, group.q, tile.head * group.q_head, group.q_stride, group, first, count);
      Operands::pack_left(queries, pointers, count, width);
      for (int64_t b = range.begin; b < range.end; ++b)
        gemm(count, columns_of(group, b), width / kDepth, queries, width / kDepth, 1, keys + b * packed, kBlockKeys,
             scores + b * kTileRows * kBlockKeys, kBlockKeys, false);
      // The exponentials are divided by their sum last: the largest, 1, is then exact in any precision.
      for (int64_t r = 0; r < count; ++r) {
        const RowSum sum = exponentials_of_row(group, scores, first + r, r, range);
        factors[r] = group.out_scale / sum.total;
        if (group.lse) group.lse[row_number(group, first + r) * group.lse_stride] = log_sum(sum);
      }
      for (int64_t b = range.begin; b < range.end; ++b) {
        const Element* weights = Operands::by_row(converted, scores + b * kTileRows * kBlockKeys);
        gemm(count, width, columns_of(group, b) / kDepth, weights, Operands::kByRowStride, 1, values + b * packed,
             width, sums, width, continues_sum(sums, earlier, count * width, b - range.begin));
      }
      add_earlier(sums, earlier, count * width, range);
      store_rows(group, sums, tile.head, first, count, factors);
    }
  }

  // Turns the scores of one row into weights and, in `grads`, gradients of the weights into gradients of the scores.
  // Returns the sum of weight * gradient, which is this row's part of the gradient of out_scale.
  static float row_gradients(const Group& group, float* scores, float* grads, int64_t row, int64_t r, Range blocks) {
    if (blocks.end - blocks.begin == 1 && sees_block(group, row, blocks.begin)) {
      const int64_t at = (blocks.begin * kTileRows + r) * kBlockKeys;
      return row_gradients_of_block(scores + at, grads + at, group.scale);
    }
    softmax_row(group, scores, row, r, blocks);
    Vec products = {};
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t at = (b * kTileRows + r) * kBlockKeys;
      for (int64_t j = 0; j < columns_of(group, b); j += kLanes)
        products += load(scores + at + j) * load(grads + at + j);
    }
    const float mean = sum_lanes(products);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t at = (b * kTileRows + r) * kBlockKeys;
      for (int64_t j = 0; j < columns_of(group, b); j += kLanes)
        store(grads + at + j, load(scores + at + j) * (load(grads + at + j) - splat(mean)));
    }
    return mean;
  }

  // Does the same in registers, for a row that sees one whole block.
  static float row_gradients_of_block(float* scores, float* grads, float scale) {
    constexpr int kVectors = kBlockKeys / kLanes;
    Vec weights[kVectors], largest = splat(-3.0e38f), sums = {}, products = {};
    for (int i = 0; i < kVectors; ++i) {
      weights[i] = load(scores + i * kLanes);
      largest = maximum(largest, weights[i]);
    }
    const Vec top = splat(max_lanes(largest)), factor = splat(scale);
    for (int i = 0; i < kVectors; ++i) {
      weights[i] = exp_nonpositive((weights[i] - top) * factor);
      sums += weights[i];
      products += weights[i] * load(grads + i * kLanes);
    }
    const float inverse = 1.0f / sum_lanes(sums), mean = sum_lanes(products) * inverse;
    for (int i = 0; i < kVectors; ++i) {
      const Vec weight = weights[i] * splat(inverse);
      store(scores + i * kLanes, weight);
      store(grads + i * kLanes, weight * (load(grads + i * kLanes) - splat(mean)));
    }
    return mean;
  }

  static void store_keys(const Group& group, const float* dk, const float* dv, int64_t block) {
    const int64_t first = block * kBlockKeys, width = group.width, key_count = group.key_count();
    const Vec dk_factor = splat(group.scale * group.out_scale), dv_factor = splat(group.out_scale);
    for (int64_t j = 0; j < kBlockKeys && first + j < key_count; ++j) {
      const bool second = first + j >= group.segments[0].count;
      const KeySegment& segment = group.segments[second ? 1 : 0];
      const int64_t at = (first + j - (second ? group.segments[0].count : 0)) * segment.d_stride;
      Stored *dk_out = static_cast<Stored*>(segment.dk) + at, *dv_out = static_cast<Stored*>(segment.dv) + at;
      for (int64_t d = 0; d < width; d += kLanes) {
        store(dk_out + d, load(dk + j * width + d) * dk_factor);
        store(dv_out + d, load(dv + j * width + d) * dv_factor);
      }
    }
  }

  static double backward(const Group& group, void* memory) {
    const int64_t width = group.width, blocks = group.block_count(), packed = kBlockKeys * width / kDepth;
    Scratch scratch{static_cast<char*>(memory)};
    Element* keys_t = scratch.template take<Element>(blocks * packed);
    Element* values_t = scratch.template take<Element>(blocks * packed);
    Element* keys = scratch.template take<Element>(blocks * packed);
    float* dk = scratch.template take<float>(blocks * kBlockKeys * width);
    float* dv = scratch.template take<float>(blocks * kBlockKeys * width);
    Element* q_left = scratch.template take<Element>(packed);
    Element* g_left = scratch.template take<Element>(packed);
    // Without pairs, rows look the same on both sides of a product.
    Element* q_stacked = kDepth == 1 ? q_left : scratch.template take<Element>(packed);
    Element* g_stacked = kDepth == 1 ? g_left : scratch.template take<Element>(packed);
    float* scores = scratch.template take<float>(blocks * kTileRows * kBlockKeys);
    float* grads = scratch.template take<float>(blocks * kTileRows * kBlockKeys);
    float* dq = scratch.template take<float>(kTileRows * width);
    float* earlier = scratch.template take<float>(kTileRows * width);
    float* converted = scratch.template take<float>(3 * kTileRows * kBlockKeys);
    const Stored* pointers[kBlockKeys];
    float factors[kTileRows];
    double out_scale_grad = 0;
    for (float& factor : factors) factor = group.scale * group.out_scale;

    // Rows that see all keys fill every block with their first tile; otherwise sums start from zero.
    const bool clear = group.key_begin || group.row_count == 0;
    if (clear) __builtin_memset(dk, 0, blocks * kBlockKeys * width * sizeof(float));
    if (clear) __builtin_memset(dv, 0, blocks * kBlockKeys * width * sizeof(float));
    for (int64_t b = 0; b < blocks && group.row_count > 0; ++b) {
      const int64_t count = gather_keys(pointers, group, b, false);
      Operands::pack_transposed(keys_t + b * packed, pointers, count, width);
      Operands::pack_stacked(keys + b * packed, pointers, count, width);
      gather_keys(pointers, group, b, true);
      Operands::pack_transposed(values_t + b * packed, pointers, count, width);
    }
    for (TileNumber tile = {0, 0}; tile.head < group.heads && group.row_count > 0; tile = tile.next(group)) {
      const int64_t first = tile.first, left = group.row_count - first, count = left < kTileRows ? left : kTileRows;
      const bool adds = clear || first > 0 || tile.head > 0;
      const Range range = visible_blocks(group, first, count);
      gather(pointers, group.q, tile.head * group.q_head, group.q_stride, group, first, count);
      Operands::pack_left(q_left, pointers, count, width);
      if (q_stacked != q_left) Operands::pack_stacked(q_stacked, pointers, count, width);
      gather(pointers, group.grad, tile.head * group.grad_head, group.grad_stride, group, first, count);
      Operands::pack_left(g_left, pointers, count, width);
      if (g_stacked != g_left) Operands::pack_stacked(g_stacked, pointers, count, width);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const int64_t columns = columns_of(group, b), at = b * kTileRows * kBlockKeys, depth = width / kDepth;
        gemm(count, columns, depth, q_left, depth, 1, keys_t + b * packed, kBlockKeys, scores + at, kBlockKeys, false);
        gemm(count, columns, depth, g_left, depth, 1, values_t + b * packed, kBlockKeys, grads + at, kBlockKeys,
             false);
      }
      for (int64_t r = 0; r < count; ++r)
        out_scale_grad += row_gradients(group, scores, grads, first + r, r, range);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const int64_t columns = columns_of(group, b), at = b * kTileRows * kBlockKeys;
        const int64_t row_depth = (count + kDepth - 1) / kDepth;
        clear_odd_row(scores + at, grads + at, count);
        const Element* weights_down = Operands::by_column(converted, scores + at);
        const Element* grads_down = Operands::by_column(converted + kTileRows * kBlockKeys, grads + at);
        const Element* grads_along = Operands::by_row(converted + 2 * kTileRows * kBlockKeys, grads + at);
        gemm(columns, width, row_depth, weights_down, 1, kBlockKeys, g_stacked, width, dv + b * kBlockKeys * width,
             width, adds);
        gemm(columns, width, row_depth, grads_down, 1, kBlockKeys, q_stacked, width, dk + b * kBlockKeys * width,
             width, adds);
        gemm(count, width, columns / kDepth, grads_along, Operands::kByRowStride, 1, keys + b * packed, width, dq,
             width, continues_sum(dq, earlier, count * width, b - range.begin));
      }
      add_earlier(dq, earlier, count * width, range);
      store_rows(group, dq, tile.head, first, count, factors);
    }
    for (int64_t b = 0; b < blocks; ++b)
      store_keys(group, dk + b * kBlockKeys * width, dv + b * kBlockKeys * width, b);
    return out_scale_grad;
  }

  // Pairs of rows are multiplied together: the partner of the last row of an odd count must be zero.
  static void clear_odd_row(float* weights, float* grads, int64_t count) {
    if (kDepth == 1 || count % 2 == 0) return;
    __builtin_memset(weights + count * kBlockKeys, 0, kBlockKeys * sizeof(float));
    __builtin_memset(grads + count * kBlockKeys, 0, kBlockKeys * sizeof(float));
  }
};
