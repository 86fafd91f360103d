// Sums of products over a block of 1024 elements; for param_chunks.h. They run over 16 lanes (element mod 16) and are
// added in one order: the same bits with every instruction set. A block is summed in float32, a fifth to two fifths
// faster than in float64, and again in float64 where its sums leave float32's range.

typedef double Doubles __attribute__((vector_size(4 * REDIT_LANES)));

constexpr int kVectors = kLanes / REDIT_LANES;

struct Pair {
  Doubles low, high;
};

REDIT_INLINE Pair in_double(Floats x) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return {(Doubles)_mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 0)),
          (Doubles)_mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1))};
#elif defined(__x86_64__) && REDIT_LANES == 8
  return {(Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
          (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#elif defined(__x86_64__)
  return {(Doubles)_mm_cvtps_pd((__m128)x), (Doubles)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x))};
#else
  Pair pair;
  for (int i = 0; i < REDIT_LANES / 2; ++i) pair.low[i] = x[i], pair.high[i] = x[i + REDIT_LANES / 2];
  return pair;
#endif
}

// At most 64 products a lane: rounding is 2e-7 of the sum.
struct InFloat32 {
  Floats part[kVectors] = {};
};

struct InFloat64 {
  Doubles part[2 * kVectors] = {};
};

REDIT_INLINE void add_products(InFloat32& lanes, int v, Floats x, Floats y) { lanes.part[v] += x * y; }

// The product is exact, so a fused multiply-add gives the bits of a product and a sum.
REDIT_INLINE Doubles add_product(Doubles sum, Doubles x, Doubles y) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#else
  return sum + x * y;
#endif
}

REDIT_INLINE void add_products(InFloat64& lanes, int v, Floats x, Floats y) {
  const Pair a = in_double(x), b = in_double(y);
  lanes.part[2 * v] = add_product(lanes.part[2 * v], a.low, b.low);
  lanes.part[2 * v + 1] = add_product(lanes.part[2 * v + 1], a.high, b.high);
}

template <class Sums>
REDIT_INLINE double total(const Sums& lanes) {
  constexpr int width = sizeof lanes.part[0] / sizeof lanes.part[0][0];
  double sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = lanes.part[i / width][i % width];
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// Of a float32 sum of squares: none can have overflowed, and 1024 below 2^-126, which a processor may be set to make 0,
// are no more than 2^-26 of it.
REDIT_INLINE bool in_range(double sum) { return sum >= 0x1p-90 && sum <= 0x1p120; }
