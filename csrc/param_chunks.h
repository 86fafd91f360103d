// A chunk of one tensor: its sum of squares, its perturbation, its combined gradient. levels.h includes this file, and
// it adamw_chunks.h, once for every instruction set, inside a namespace whose name carries it. Sums run over 16 lanes
// (element mod 16) of float64 and are added in one order: the same bits with every instruction set.

#include "simd.h"

typedef double Doubles __attribute__((vector_size(4 * REDIT_LANES)));
typedef uint64_t Calls __attribute__((vector_size(4 * REDIT_LANES)));  // a word of each of REDIT_LANES / 2 Philox calls

constexpr Dtype dtype_of(Float32) { return Dtype::float32; }
constexpr Dtype dtype_of(BFloat16) { return Dtype::bfloat16; }
constexpr Dtype dtype_of(Float16) { return Dtype::float16; }

constexpr int kVectors = kLanes / REDIT_LANES, kCalls = REDIT_LANES / 2;

// Elements as W (float or double): in place where they are W already, else converted into `buffer`.
template <class W>
W* load(W* __restrict buffer, const Array& from, int64_t first, int64_t n) {
  if (from.dtype == kDtype<W>) return static_cast<W*>(from.data) + first;
  if (from.dtype == Dtype::float32) {
    const float* __restrict x = static_cast<const float*>(from.data) + first;
    for (int64_t i = 0; i < n; ++i) buffer[i] = W(x[i]);
  } else if (from.dtype == Dtype::float64) {
    const double* __restrict x = static_cast<const double*>(from.data) + first;
    for (int64_t i = 0; i < n; ++i) buffer[i] = W(x[i]);
  } else {
    const uint16_t* __restrict x = static_cast<const uint16_t*>(from.data) + first;
    if (from.dtype == Dtype::bfloat16)
      for (int64_t i = 0; i < n; ++i) buffer[i] = W(from_bfloat16(x[i]));
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = W(from_float16(x[i]));
  }
  return buffer;
}

template <class W>
void store(const Array& to, int64_t first, int64_t n, const W* x) {
  if (to.dtype == Dtype::float32) {
    float* out = static_cast<float*>(to.data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = float(x[i]);
  } else if (to.dtype == Dtype::float64) {
    double* out = static_cast<double*>(to.data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = double(x[i]);
  } else {
    uint16_t* __restrict out = static_cast<uint16_t*>(to.data) + first;
    if (to.dtype == Dtype::bfloat16)
      for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(float(x[i]));
    else
      for (int64_t i = 0; i < n; ++i) out[i] = to_float16(float(x[i]));
  }
}

template <class W>
void scale_elements(const Array& x, int64_t first, int64_t n, W factor) {
  alignas(64) W buffer[kBlock];
  W* values = load(buffer, x, first, n);
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
  if (values == buffer) store(x, first, n, static_cast<const W*>(values));
}

void scale_block(const Array& x, int64_t first, int64_t n, double factor) {
  if (factor == 1) return;
  if (x.dtype == Dtype::float64)
    scale_elements(x, first, n, factor);
  else
    scale_elements(x, first, n, float(factor));
}

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
  for (int i = 0; i < kCalls; ++i) pair.low[i] = x[i], pair.high[i] = x[i + kCalls];
  return pair;
#endif
}

struct Lanes {
  Doubles part[2 * kVectors] = {};
};

// x and y were float32, so their product is exact and a fused multiply-add, which saves 15 % of a perturbation, gives
// the bits of a product and a sum.
REDIT_INLINE Doubles add_product(Doubles sum, Doubles x, Doubles y) {
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#else
  return sum + x * y;
#endif
}

REDIT_INLINE void add_products(Lanes& lanes, int v, const Pair& x, const Pair& y) {
  lanes.part[2 * v] = add_product(lanes.part[2 * v], x.low, y.low);
  lanes.part[2 * v + 1] = add_product(lanes.part[2 * v + 1], x.high, y.high);
}

REDIT_INLINE double total(const Lanes& lanes) {
  double sum = 0;
  for (int v = 0; v < 2 * kVectors; ++v)
    for (int i = 0; i < kCalls; ++i) sum += lanes.part[v][i];
  return sum;
}

template <class Type>
double sum_of_squares(const void* tensor, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename Type::Stored*>(tensor);
  Lanes lanes;
  const auto add = [&](const typename Type::Stored* from) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Pair pair = in_double(Type::load(from + v * REDIT_LANES));
      add_products(lanes, v, pair, pair);
    }
  };
  for (; begin + kLanes <= end; begin += kLanes) add(x + begin);
  if (begin < end) {
    typename Type::Stored last[kLanes] = {};
    __builtin_memcpy(last, x + begin, size_t(end - begin) * sizeof *x);
    add(last);
  }
  return total(lanes);
}

REDIT_INLINE Calls product(Calls x, uint32_t factor) {  // of the low 32 bits
#if defined(__x86_64__) && REDIT_LANES == 16
  return (Calls)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__x86_64__) && REDIT_LANES == 8
  return (Calls)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__x86_64__)
  return (Calls)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xFFFFFFFFu) * uint64_t(factor);
#endif
}

// The halves of the Philox calls first, first + 1, ...: eight a call, up to whole vectors of calls. element.h's
// philox4x32 with its words in the low 32 bits of 64-bit lanes, where the multiplier wants them; what is above them is
// dropped at the end. 6 instructions a round: 0.2 ns a weight with AVX-512.
REDIT_INLINE void philox_halves(uint16_t* halves, int64_t calls, uint64_t first, uint64_t seed, uint32_t step) {
  Calls id = {};
  for (int i = 0; i < kCalls; ++i) id[i] = first + uint64_t(i);
  for (int64_t call = 0; call < calls; call += kCalls, id += kCalls, halves += 8 * kCalls) {
    Calls c0 = id, c1 = id >> 32, c2 = Calls{} + kStreamRounding, c3 = Calls{} + step;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
      const Calls p0 = product(c0, kPhiloxFactor0), p1 = product(c2, kPhiloxFactor1);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0), c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1), c3 = p0;
    }
    const Calls words01 = (c0 & 0xFFFFFFFFu) | (c1 << 32), words23 = (c2 & 0xFFFFFFFFu) | (c3 << 32);
#if REDIT_LANES == 16
    const Calls low = __builtin_shufflevector(words01, words23, 0, 8, 1, 9, 2, 10, 3, 11);
    const Calls high = __builtin_shufflevector(words01, words23, 4, 12, 5, 13, 6, 14, 7, 15);
#elif REDIT_LANES == 8
    const Calls low = __builtin_shufflevector(words01, words23, 0, 4, 1, 5);
    const Calls high = __builtin_shufflevector(words01, words23, 2, 6, 3, 7);
#else
    const Calls low = __builtin_shufflevector(words01, words23, 0, 2);
    const Calls high = __builtin_shufflevector(words01, words23, 1, 3);
#endif
    __builtin_memcpy(halves, &low, sizeof low);
    __builtin_memcpy(halves + 4 * kCalls, &high, sizeof high);
  }
}

// Stores x rounded to the type and gives back what it stored: to nearest where `halves` is null, else up with the
// probability of the bits that the type drops.
REDIT_INLINE Floats put(Float32, float* to, Floats x, const uint16_t*) {
  Float32::store(to, x);
  return x;
}

REDIT_INLINE Words load_halves(const uint16_t* halves) {
  Halves bits;
  __builtin_memcpy(&bits, halves, sizeof bits);
  return widen(bits);
}

REDIT_INLINE Floats put(BFloat16, uint16_t* to, Floats x, const uint16_t* halves) {
  const Words bits = (Words)x;
  const Words rounded = bits + (halves ? load_halves(halves) : ((bits >> 16) & 1u) + 0x7FFFu);
  const Words kept = x == x ? rounded & 0xFFFF0000u : Words{} + 0x7FC00000u;
  const Halves out = narrow(kept >> 16);
  __builtin_memcpy(to, &out, sizeof out);
  return (Floats)kept;
}

REDIT_INLINE Floats put(Float16, uint16_t* to, Floats x, const uint16_t* halves) {
  if (halves) x = (Floats)(((Words)x + (load_halves(halves) & 0x1FFFu)) & ~0x1FFFu);
  Float16::store(to, x == x ? x : splat(__builtin_nanf("")));
  return Float16::load(to);
}

REDIT_INLINE Floats seen_as(Dtype seen, Floats x) {
  uint16_t stored[REDIT_LANES];
  if (seen == Dtype::bfloat16) return put(BFloat16{}, stored, x, nullptr);
  if (seen == Dtype::float16) return put(Float16{}, stored, x, nullptr);
  return x;
}

struct PerturbSums {
  Lanes dot, applied, intended;
  Ints moved[kVectors] = {};
};

// n elements from x and g on; halves: of each element and up to 15 more, or null. Past the end zeros are perturbed to
// zeros, whatever the half.
template <class Type, class Grad>
void perturb_block(PerturbSums& all, typename Type::Stored* x, typename Grad::Stored* g, int64_t n,
                   const uint16_t* halves, float scale, float grad_factor, Dtype seen) {
  PerturbSums sums = all;  // in registers
  const auto perturb_16 = [&](typename Type::Stored* x, typename Grad::Stored* g, const uint16_t* halves)
      __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * REDIT_LANES;
      Floats old = Type::load(x + at);
      const Floats slope = Grad::load(g + at), intended = slope * scale;
      if (grad_factor != 1) put(Grad{}, g + at, slope * grad_factor, nullptr);
      Floats now = put(Type{}, x + at, old + intended, halves ? halves + at : nullptr);
      if (seen != dtype_of(Type{})) old = seen_as(seen, old), now = seen_as(seen, now);
      sums.moved[v] -= now != old;
      const Pair a = in_double(now - old), b = in_double(intended);
      add_products(sums.dot, v, a, b);
      add_products(sums.applied, v, a, a);
      add_products(sums.intended, v, b, b);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) perturb_16(x + i, g + i, halves ? halves + i : nullptr);
  if (i < n) {
    typename Type::Stored last_x[kLanes] = {};
    typename Grad::Stored last_g[kLanes] = {};
    __builtin_memcpy(last_x, x + i, size_t(n - i) * sizeof *x);
    __builtin_memcpy(last_g, g + i, size_t(n - i) * sizeof *g);
    perturb_16(last_x, last_g, halves ? halves + i : nullptr);
    __builtin_memcpy(x + i, last_x, size_t(n - i) * sizeof *x);
    if (grad_factor != 1) __builtin_memcpy(g + i, last_g, size_t(n - i) * sizeof *g);
  }
  all = sums;
}

template <class Type>
void perturb(double* sums, const Array& param, const Array& grad, int64_t begin, int64_t end, int64_t offset,
             const PerturbOptions& options) {
  using Stored = typename Type::Stored;
  auto* x = static_cast<Stored*>(param.data);
  PerturbSums lanes;
  const float scale = float(options.scale), factor = float(options.grad_factor);
  const Dtype seen = options.compute_dtype < 0 ? dtype_of(Type{}) : Dtype(options.compute_dtype);
  alignas(64) uint16_t halves[kBlock + 8 + 8 * kCalls];
  alignas(64) float buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock, first = offset + begin;
    const uint16_t* of_element = nullptr;
    if (options.stochastic && sizeof(Stored) == 2) {
      philox_halves(halves, (first % 8 + n + 7) / 8, uint64_t(first / 8), options.seed, options.step);
      of_element = halves + first % 8;
    }
    if (grad.dtype == dtype_of(Type{}))
      perturb_block<Type, Type>(lanes, x + begin, static_cast<Stored*>(grad.data) + begin, n, of_element, scale,
                                factor, seen);
    else {
      perturb_block<Type, Float32>(lanes, x + begin, load(buffer, grad, begin, n), n, of_element, scale, 1, seen);
      scale_block(grad, begin, n, options.grad_factor);
    }
  }
  int64_t moved = 0;
  for (const Ints& count : lanes.moved)
    for (int i = 0; i < REDIT_LANES; ++i) moved += count[i];
  sums[0] = total(lanes.dot), sums[1] = total(lanes.applied), sums[2] = total(lanes.intended);
  sums[3] = double(moved);
}

template <class Type>
void combine(double* sums, const Array& first, const Array& grad, int64_t begin, int64_t end, double ratio) {
  using Stored = typename Type::Stored;
  const auto* old = static_cast<const Stored*>(first.data);
  auto* g = static_cast<Stored*>(grad.data);
  const float share = float(ratio), rest = float(1 - ratio);
  Lanes second, gaps, combined;
  const auto combine_16 = [&](const Stored* old, Stored* g) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * REDIT_LANES;
      const Floats g1 = Type::load(old + at), g2 = Type::load(g + at);
      const Pair both = in_double(put(Type{}, g + at, rest * g1 + share * g2, nullptr));
      const Pair now = in_double(g2), gap = in_double(g2 - g1);
      add_products(second, v, now, now);
      add_products(gaps, v, gap, gap);
      add_products(combined, v, both, both);
    }
  };
  for (; begin + kLanes <= end; begin += kLanes) combine_16(old + begin, g + begin);
  if (begin < end) {
    const size_t bytes = size_t(end - begin) * sizeof *g;
    Stored last_old[kLanes] = {}, last_g[kLanes] = {};
    __builtin_memcpy(last_old, old + begin, bytes);
    __builtin_memcpy(last_g, g + begin, bytes);
    combine_16(last_old, last_g);
    __builtin_memcpy(g + begin, last_g, bytes);
  }
  sums[0] = total(second), sums[1] = total(gaps), sums[2] = total(combined);
}

// float64, without a low-precision type beside it: plain loops, and its products are rounded before they are added.
double total(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

double sum_of_squared_doubles(const void* tensor, int64_t begin, int64_t end) {
  const auto* x = static_cast<const double*>(tensor);
  double lanes[kLanes] = {};
  for (int64_t i = begin; i < end; ++i) lanes[(i - begin) % kLanes] += x[i] * x[i];
  return total(lanes);
}

double seen_as(Dtype seen, double x) {
  if (seen == Dtype::float32) return double(float(x));
  if (seen == Dtype::bfloat16) return double(from_bfloat16(to_bfloat16(float(x))));
  if (seen == Dtype::float16) return double(from_float16(to_float16(float(x))));
  return x;
}

void perturb_doubles(double* sums, const Array& param, const Array& grad, int64_t begin, int64_t end, int64_t,
                     const PerturbOptions& options) {
  auto* x = static_cast<double*>(param.data);
  const Dtype seen = options.compute_dtype < 0 ? Dtype::float64 : Dtype(options.compute_dtype);
  alignas(64) double buffer[kBlock], lanes[4][kLanes] = {};
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const double* g = load(buffer, grad, begin, n);
    for (int64_t i = 0; i < n; ++i) {
      const double old = x[begin + i], intended = options.scale * g[i], now = old + intended;
      const double applied = seen_as(seen, now) - seen_as(seen, old);
      x[begin + i] = now;
      lanes[0][i % kLanes] += applied * intended;
      lanes[1][i % kLanes] += applied * applied;
      lanes[2][i % kLanes] += intended * intended;
      lanes[3][i % kLanes] += applied != 0 ? 1.0 : 0.0;
    }
    scale_block(grad, begin, n, options.grad_factor);
  }
  for (int k = 0; k < 4; ++k) sums[k] = total(lanes[k]);
}

void combine_doubles(double* sums, const Array& first, const Array& grad, int64_t begin, int64_t end, double ratio) {
  const auto* old = static_cast<const double*>(first.data);
  auto* g = static_cast<double*>(grad.data);
  double lanes[3][kLanes] = {};
  for (int64_t i = begin; i < end; ++i) {
    const double gap = g[i] - old[i], both = (1 - ratio) * old[i] + ratio * g[i];
    lanes[0][i % kLanes] += g[i] * g[i];
    lanes[1][i % kLanes] += gap * gap;
    lanes[2][i % kLanes] += both * both;
    g[i] = both;
  }
  for (int k = 0; k < 3; ++k) sums[k] = total(lanes[k]);
}

#include "adamw_chunks.h"

constexpr ChunkKernels kKernels[4] = {
    {&sum_of_squares<Float32>, &perturb<Float32>, &combine<Float32>, &adamw<Float32>},
    {&sum_of_squares<BFloat16>, &perturb<BFloat16>, &combine<BFloat16>, &adamw<BFloat16>},
    {&sum_of_squares<Float16>, &perturb<Float16>, &combine<Float16>, &adamw<Float16>},
    {&sum_of_squared_doubles, &perturb_doubles, &combine_doubles, &adamw_doubles}};

#undef REDIT_INLINE
