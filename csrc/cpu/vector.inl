// Defines vectors of floats in the compiler's portable notation. The including file sets their size and the
// instruction set: it defines FLAMINGO_LANES (floats of a vector) and opens a namespace of that instruction set.

typedef float Vec __attribute__((vector_size(FLAMINGO_LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(FLAMINGO_LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(FLAMINGO_LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(FLAMINGO_LANES * 2)));
typedef float VecUnaligned __attribute__((vector_size(FLAMINGO_LANES * 4), aligned(4), may_alias));
typedef uint32_t VecBitsUnaligned __attribute__((vector_size(FLAMINGO_LANES * 4), aligned(4), may_alias));
typedef uint16_t VecHalfUnaligned __attribute__((vector_size(FLAMINGO_LANES * 2), aligned(2), may_alias));

static constexpr int kLanes = FLAMINGO_LANES;

static inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }
static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN

// Returns x with its lanes rotated by `distance`.
template <int distance>
static inline Vec rotate(Vec x) {
  Vec rotated = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rotated[i] = x[(i + distance) % kLanes];
  return rotated;
}

template <int distance = kLanes / 2>
static inline float sum_lanes(Vec x) {
  if constexpr (distance == 0) return x[0];
  else return sum_lanes<distance / 2>(x + rotate<distance>(x));
}

template <int distance = kLanes / 2>
static inline float max_lanes(Vec x) {
  if constexpr (distance == 0) return x[0];
  else return max_lanes<distance / 2>(maximum(x, rotate<distance>(x)));
}

static inline VecInt lane_numbers() {
  VecInt numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// Returns e^x for x <= 0 with a relative error below 2e-7: 2^n from the exponent bits, times 2^f by a polynomial on
// [-0.5, 0.5]. NaN stays NaN.
static inline Vec exp_nonpositive(Vec x) {
  const Vec t = maximum(splat(-87.0f), x) * splat(1.44269504f);
  const Vec round = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Vec n = (t + round) - round;
  const Vec f = t - n;
  Vec p = splat(1.5403530e-4f);
  p = p * f + splat(1.3333558e-3f);
  p = p * f + splat(9.6181291e-3f);
  p = p * f + splat(5.5504109e-2f);
  p = p * f + splat(2.4022651e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.0f);
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

// bfloat16 is the upper half of a float32. Rounding is to nearest even; NaN stays NaN.
static inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline VecBits round_to_bf16_bits(Vec x) {
  const VecBits bits = reinterpret_cast<VecBits>(x);
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : VecBits{} + 0x7fc0u;
}

static inline Vec load(const uint16_t* p) {
  const VecBits bits = __builtin_convertvector(*reinterpret_cast<const VecHalfUnaligned*>(p), VecBits) << 16;
  return reinterpret_cast<Vec>(bits);
}

static inline void store(uint16_t* p, Vec x) {
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(round_to_bf16_bits(x), VecHalf);
}

// Transposes kLanes vectors of kLanes floats in place: each step exchanges blocks of twice the size of the last.
static inline void transpose(Vec (&rows)[kLanes]) {
#if defined(__clang__)
  Vec columns[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) columns[i][j] = rows[j][i];
  for (int i = 0; i < kLanes; ++i) rows[i] = columns[i];
#else
#pragma GCC unroll 4
  for (int size = 1; size < kLanes; size *= 2) {
    VecInt upper, lower;  // lanes of (a, b) numbered 0 .. 2 * kLanes - 1
    for (int i = 0; i < kLanes; ++i) {
      upper[i] = i & size ? i - size + kLanes : i;
      lower[i] = i & size ? i + kLanes : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & size) continue;
      const Vec a = rows[i], b = rows[i + size];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
#endif
}
