// Vectors of REDIT_LANES floats in the compiler's own vector types: + - * / compare and select. Intrinsics where those
// have no word for it (fused multiply-add, half again as fast here) or where the compiler's lowering is slow. One
// source gives the same bits with AVX2, AVX-512 and NEON registers; SSE2, which cannot fuse, rounds twice. No include
// guard: token_rows.h includes it once per instruction set, inside that set's namespace.

#define REDIT_INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * REDIT_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * REDIT_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * REDIT_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * REDIT_LANES)));

REDIT_INLINE Floats splat(float x) { return x - Floats{}; }  // x - 0 keeps -0, NaN and infinities

REDIT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// y within the bounds of power_of_two; NaN stays: maxps and minps return their second operand then. (Compare and blend
// cost 10 % more.)
REDIT_INLINE Floats bounded(Floats y) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Floats)_mm512_maskz_max_ps(0xFFFF, (__m512)splat(-160.0f), (__m512)y);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Floats)_mm256_min_ps((__m256)splat(90.0f), _mm256_max_ps((__m256)splat(-127.0f), (__m256)y));
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps((__m128)splat(90.0f), _mm_max_ps((__m128)splat(-127.0f), (__m128)y));
#else
  y = y < -127.0f ? splat(-127.0f) : y;
  return y > 90.0f ? splat(90.0f) : y;
#endif
}

// 2^y of a bounded y, exactly 0 at the lower bound; above e^40 = 2^57.7 only its size matters. NaN stays. Minimax
// polynomial of 2^f on [-1/2, 1/2] with p(0) = 1: error 1.1e-7 with its coefficients in float32. AVX-512 scales down to
// denormals and up to infinity; elsewhere 2^n is made in the exponent, and 0 below 2^-126.
REDIT_INLINE Floats power_of_two(Floats y) {
#if defined(__x86_64__) && REDIT_LANES == 16
  const Floats n = (Floats)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)y, 0), f = y - n;
#else
  // the low bits of y + 1.5 * 2^23 are the integer n nearest to y
  const Floats shifted = y + 12582912.0f, f = y - (shifted - 12582912.0f);
#endif
  Floats p = multiply_add(f, splat(1.326473110e-03f), splat(9.671513994e-03f));
  p = multiply_add(p, f, splat(5.550733746e-02f));
  p = multiply_add(p, f, splat(2.402224206e-01f));
  p = multiply_add(p, f, splat(6.931469776e-01f));
  p = multiply_add(p, f, splat(1.0f));
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Floats)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
  return p * (Floats)(((Words)shifted << 23) + 0x3F800000u);
#endif
}

// tanh u; NaN stays. Below 0.625 Cephes' odd polynomial, above it 1 - 2 / (e^2|u| + 1): error 1.5e-7.
REDIT_INLINE Floats hyperbolic_tangent(Floats u) {
  const Floats size = (Floats)((Words)u & 0x7FFFFFFFu), square = u * u;
  Floats small = multiply_add(square, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
  small = multiply_add(small, square, splat(-5.37397155531e-2f));
  small = multiply_add(small, square, splat(1.33314422036e-1f));
  small = multiply_add(small, square, splat(-3.33332819422e-1f));
  small = multiply_add(small * square, u, u);
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
  // To nearest even. No case for NaN: a NaN that came from bfloat16 inputs has zeros below, and stays one.
  REDIT_INLINE void store(uint16_t* x, Floats value) {
    const Words bits = (Words)value;
    const Halves out = narrow((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
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
