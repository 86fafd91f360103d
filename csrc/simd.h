// Vectors of REDIT_LANES floats in the compiler's own vector types: + - * / compare and select, no fused multiply-add.
// Intrinsics only where the compiler's lowering is slow and their result is the same to the bit: minimum and maximum,
// conversions of 16-bit numbers. So one source gives the same bits with SSE2, AVX2, AVX-512 and NEON registers.
// No include guard: token_rows.h includes it once per instruction set, inside that set's namespace.

#define REDIT_INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * REDIT_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * REDIT_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * REDIT_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * REDIT_LANES)));

REDIT_INLINE Floats splat(float x) { return x - Floats{}; }  // x - 0 keeps -0, NaN and infinities

// low <= y <= high; NaN stays: maxps and minps return their second operand then. (Compare and blend cost 10 % more.)
REDIT_INLINE Floats clamp(Floats y, float low, float high) {
#if defined(__x86_64__) && REDIT_LANES == 16
  y = (Floats)_mm512_maskz_max_ps(0xFFFF, (__m512)splat(low), (__m512)y);
  return (Floats)_mm512_maskz_min_ps(0xFFFF, (__m512)splat(high), (__m512)y);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Floats)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)y));
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps((__m128)splat(high), _mm_max_ps((__m128)splat(low), (__m128)y));
#else
  y = low > y ? splat(low) : y;
  return high < y ? splat(high) : y;
#endif
}

// 2^y for y up to 127 and exactly 0 from -127.4 to -126.5; NaN stays. Minimax polynomial of 2^f on [-1/2, 1/2]: error
// 1.6e-8 with its coefficients in float32. The low bits of y + 1.5 * 2^23 are the integer n nearest to y; n + 127 moved
// into the exponent is 2^n, and 0 at n = -127.
REDIT_INLINE Floats power_of_two(Floats y) {
  const Floats shifted = y + 12582912.0f, f = y - (shifted - 12582912.0f);
  Floats p = f * 1.535336050e-04f + 1.339887502e-03f;
  p = p * f + 9.618436918e-03f;
  p = p * f + 5.550332367e-02f;
  p = p * f + 2.402264774e-01f;
  p = p * f + 6.931471825e-01f;
  p = p * f + 1.0f;
  return p * (Floats)(((Words)shifted << 23) + 0x3F800000u);
}

// tanh u; NaN stays. Below 0.625 Cephes' odd polynomial, above it 1 - 2 / (e^2|u| + 1): error 1.5e-7.
REDIT_INLINE Floats hyperbolic_tangent(Floats u) {
  const Floats size = (Floats)((Words)u & 0x7FFFFFFFu), square = u * u;
  Floats small = square * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * square + -5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square + -3.33332819422e-1f;
  small = small * square * u + u;
  const Floats large = 1.0f - 2.0f / (power_of_two(size > 10.0f ? splat(30.0f) : size * 2.88539008f) + 1.0f);
  return size < 0.625f ? small : (Floats)((Words)large | ((Words)u & 0x80000000u));
}

// GCC 12 lowers __builtin_convertvector here through two half vectors.
REDIT_INLINE Words widen(Halves x) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

REDIT_INLINE Halves narrow(Words x) {  // the low halves
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

struct Float32 {
  using Stored = float;
  REDIT_INLINE Floats load(const float* x) {
    Floats out;
    __builtin_memcpy(&out, x, sizeof out);
    return out;
  }
  REDIT_INLINE void store(float* x, Floats value) { __builtin_memcpy(x, &value, sizeof value); }
};

struct BFloat16 {
  using Stored = uint16_t;
  REDIT_INLINE Floats load(const uint16_t* x) {
    Halves bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return (Floats)(widen(bits) << 16);
  }
  REDIT_INLINE void store(uint16_t* x, Floats value) {  // to nearest even
    const Words bits = (Words)value, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Halves out = narrow(value == value ? rounded : Words{} + 0x7FC0u);
    __builtin_memcpy(x, &out, sizeof out);
  }
};

struct Float16 {
  using Stored = uint16_t;
  REDIT_INLINE Floats load(const uint16_t* x) {
    Halves halves;
    __builtin_memcpy(&halves, x, sizeof halves);
#if defined(__x86_64__) && REDIT_LANES == 16
    return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)halves);
#elif defined(__x86_64__) && REDIT_LANES == 8
    return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
    const Words bits = widen(halves), sign = (bits & 0x8000u) << 16;
    const Words size = (bits & 0x7FFFu) << 13;  // exponent and mantissa where float32 has them, bias 15 instead of 127
    const Words normal = size + (112u << 23), special = size + (224u << 23);
    const Words subnormal = (Words)((Floats)(size + (113u << 23)) - 6.103515625e-5f);
    const Words value = size < 0x00800000u ? subnormal : (size < 0x0F800000u ? normal : special);
    return (Floats)(value | sign);
#endif
  }
  REDIT_INLINE void store(uint16_t* x, Floats value) {  // to nearest even
#if defined(__x86_64__) && REDIT_LANES == 16
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const Halves halves = (Halves)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)value, nearest);
#elif defined(__x86_64__) && REDIT_LANES == 8
    const Halves halves = (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Words bits = (Words)value, sign = (bits & 0x80000000u) >> 16, size = bits & 0x7FFFFFFFu;
    const Words normal = (size - (112u << 23) + 0xFFFu + ((size >> 13) & 1u)) >> 13;  // from 65520 on it carries to inf
    const Words subnormal = (Words)((Floats)size + 0.5f) - 0x3F000000u;  // 0.5's last bit is float16's smallest number
    const Words special = value == value ? Words{} + 0x7C00u : Words{} + 0x7E00u;
    const Words out = size < (113u << 23) ? subnormal : (size < (143u << 23) ? normal : special);
    const Halves halves = narrow(out | sign);
#endif
    __builtin_memcpy(x, &halves, sizeof halves);
  }
};
