// Lays out the operands of the products, for the two kinds of arithmetic.
//
// A product sums over the rows of B. `transposed` turns keys into columns. `stacked` keeps one key (or query row) in
// a row. `weights` are softmax weights or their gradients; as A they are read along a row ("by row") or down a column
// ("by column").

template <class Element>
static inline const Element* key_row(const Group& group, int64_t key, bool values) {
  const KeySegment& first = group.segments[0];
  const bool second = key >= first.count;
  const KeySegment& segment = group.segments[second ? 1 : 0];
  const int64_t row = second ? key - first.count : key;
  return static_cast<const Element*>(values ? segment.v : segment.k) +
         row * (values ? segment.v_stride : segment.k_stride);
}

// float32 products; bfloat16 tensors are widened while they are packed.
template <class Stored>
struct FloatOperands {
  typedef float Element;
  static constexpr int64_t kDepth = 1;  // values of the summed dimension in one element

  // [width, 64] from up to 64 keys; the columns of keys that do not exist are zero.
  static void pack_transposed(float* packed, const Stored* const* keys, int64_t count, int64_t width) {
    for (int64_t d = 0; d < width; d += kLanes)
      for (int64_t j = 0; j < kBlockKeys; j += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = j + i < count ? load(keys[j + i] + d) : Vec{};
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kBlockKeys + j, square[i]);
      }
  }

  // [64, width] from up to 64 rows; the rows that do not exist are zero.
  static void pack_stacked(float* packed, const Stored* const* rows, int64_t count, int64_t width) {
    for (int64_t j = 0; j < kBlockKeys; ++j)
      for (int64_t d = 0; d < width; d += kLanes)
        store(packed + j * width + d, j < count ? load(rows[j] + d) : Vec{});
  }

  // Left operand [count, width] whose rows are summed along the width.
  static void pack_left(float* packed, const Stored* const* rows, int64_t count, int64_t width) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < width; d += kLanes) store(packed + j * width + d, load(rows[j] + d));
  }

  // Weights are used where they are.
  static const float* by_row(float*, const float* block) { return block; }
  static constexpr int64_t kByRowStride = kBlockKeys;
  static const float* by_column(float*, const float* block) { return block; }
};
