// Computes C [M, N] = A [M, K] * B [K, N] (+ C) in registers of kRows x (kVectors * kLanes).
//
// An element of A and B is a float, or a pair of bfloat16 that lie next to each other along K (then K counts pairs
// and `multiply_add` is the processor's dot product of pairs). C is always float. A may be read in any order; the
// rows of B and C are contiguous. N is a multiple of 16.

static inline Vec multiply_add(const float* a, const float* b, Vec c) { return splat(*a) * load(b) + c; }

template <int kRows, int kVectors, class Element>
static inline void gemm_tile(int64_t depth, const Element* a, int64_t a_row, int64_t a_depth, const Element* b,
                             int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  Vec sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVectors; ++j) sum[r][j] = accumulate ? load(c + r * c_stride + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k)
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kVectors; ++j)
        sum[r][j] = multiply_add(a + r * a_row + k * a_depth, b + k * b_stride + j * kLanes, sum[r][j]);
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVectors; ++j) store(c + r * c_stride + j * kLanes, sum[r][j]);
}

template <int kVectors, class Element>
static inline void gemm_columns(int64_t rows, int64_t depth, const Element* a, int64_t a_row, int64_t a_depth,
                                const Element* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6)
    gemm_tile<6, kVectors>(depth, a + m * a_row, a_row, a_depth, b, b_stride, c + m * c_stride, c_stride, accumulate);
  for (; m + 4 <= rows; m += 4)
    gemm_tile<4, kVectors>(depth, a + m * a_row, a_row, a_depth, b, b_stride, c + m * c_stride, c_stride, accumulate);
  for (; m + 2 <= rows; m += 2)
    gemm_tile<2, kVectors>(depth, a + m * a_row, a_row, a_depth, b, b_stride, c + m * c_stride, c_stride, accumulate);
  if (m < rows)
    gemm_tile<1, kVectors>(depth, a + m * a_row, a_row, a_depth, b, b_stride, c + m * c_stride, c_stride, accumulate);
}

template <class Element>
static void gemm(int64_t rows, int64_t columns, int64_t depth, const Element* a, int64_t a_row, int64_t a_depth,
                 const Element* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  constexpr int kWide = FLAMINGO_LANES == 16 ? 4 : 2;
  int64_t n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    gemm_columns<kWide>(rows, depth, a, a_row, a_depth, b + n, b_stride, c + n, c_stride, accumulate);
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    gemm_columns<2>(rows, depth, a, a_row, a_depth, b + n, b_stride, c + n, c_stride, accumulate);
  for (; n + kLanes <= columns; n += kLanes)
    gemm_columns<1>(rows, depth, a, a_row, a_depth, b + n, b_stride, c + n, c_stride, accumulate);
}
