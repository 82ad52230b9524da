// Lays out operands as pairs of bfloat16: an element holds two values that are neighbors along the summed dimension.
struct PairOperands {
  typedef uint32_t Element;
  static constexpr int64_t kDepth = 2;

  static inline __m512i round_pairs(const float* low, const float* high) {
    const __m512i lower = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(low))));
    const __m512i upper = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(high))));
    return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
  }

  // [width / 2, 64]: pairs along the width, one column a key.
  static void pack_transposed(uint32_t* packed, const uint16_t* const* keys, int64_t count, int64_t width) {
    for (int64_t j = 0; j < kBlockKeys; j += 16) transpose_16_keys(packed + j, keys + j, count - j, width);
  }

  // Sixteen keys become sixteen columns: a 16 x 16 transposition of pairs in registers, 32 values of the width a step.
  static void transpose_16_keys(uint32_t* packed, const uint16_t* const* keys, int64_t count, int64_t width) {
    for (int64_t d = 0; d < width; d += 32) {
      alignas(64) uint32_t block[16][16];
      const int64_t pairs = width - d < 32 ? (width - d) / 2 : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << pairs) - 1);
      for (int64_t j = 0; j < 16; ++j)
        _mm512_store_si512(block[j], j < count ? _mm512_maskz_loadu_epi32(mask, keys[j] + d) : _mm512_setzero_si512());
      const __m512i step = _mm512_mullo_epi32(
          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
      for (int64_t p = 0; p < pairs; ++p)
        _mm512_storeu_si512(packed + (d / 2 + p) * kBlockKeys, _mm512_i32gather_epi32(step, &block[0][p], 4));
    }
  }

  // [32, width]: pairs of rows, one column a position of the width.
  static void pack_stacked(uint32_t* packed, const uint16_t* const* rows, int64_t count, int64_t width) {
    for (int64_t j = 0; j < kBlockKeys; j += 2)
      for (int64_t d = 0; d < width; d += 16) {
        const __m512i low = j < count ? widen(rows[j] + d) : _mm512_setzero_si512();
        const __m512i high = j + 1 < count ? widen(rows[j + 1] + d) : _mm512_setzero_si512();
        _mm512_storeu_si512(packed + j / 2 * width + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
  static inline __m512i widen(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static void pack_left(uint32_t* packed, const uint16_t* const* rows, int64_t count, int64_t width) {
    for (int64_t j = 0; j < count; ++j) __builtin_memcpy(packed + j * width / 2, rows[j], width * sizeof(uint16_t));
  }

  // A block of weights with pairs along a row: [64 rows, 32 pairs of keys].
  static const uint32_t* by_row(float* memory, const float* block) {
    for (int64_t at = 0; at < kTileRows * kBlockKeys; at += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(memory) + at),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(block + at))));
    return reinterpret_cast<const uint32_t*>(memory);
  }
  static constexpr int64_t kByRowStride = kBlockKeys / 2;

  // A block of weights with pairs down a column: [32 pairs of rows, 64 keys].
  static const uint32_t* by_column(float* memory, const float* block) {
    uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
    for (int64_t r = 0; r < kTileRows; r += 2)
      for (int64_t j = 0; j < kBlockKeys; j += 16)
        _mm512_storeu_si512(packed + r / 2 * kBlockKeys + j,
                            round_pairs(block + r * kBlockKeys + j, block + (r + 1) * kBlockKeys + j));
    return packed;
  }
};
