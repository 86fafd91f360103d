// A chunk of one tensor: its sum of squares, its perturbation, its combined gradient. levels.h includes this file, and
// it adamw_chunks.h, once for every instruction set, inside a namespace whose name carries it.

#include "simd.h"
#include "block_sums.h"

typedef uint64_t Calls __attribute__((vector_size(4 * REDIT_LANES)));  // a word of each of REDIT_LANES / 2 Philox calls

constexpr Dtype dtype_of(Float32) { return Dtype::float32; }
constexpr Dtype dtype_of(BFloat16) { return Dtype::bfloat16; }
constexpr Dtype dtype_of(Float16) { return Dtype::float16; }

constexpr int kCalls = REDIT_LANES / 2;

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

template <class Sums, class Type>
double block_sum_of_squares(const typename Type::Stored* x, int64_t n) {
  Sums lanes;
  const auto add = [&](const typename Type::Stored* from) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = Type::load(from + v * REDIT_LANES);
      add_products(lanes, v, value, value);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(x + i);
  if (i < n) {
    typename Type::Stored last[kLanes] = {};
    __builtin_memcpy(last, x + i, size_t(n - i) * sizeof *x);
    add(last);
  }
  return total(lanes);
}

template <class Type>
double sum_of_squares(const void* tensor, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename Type::Stored*>(tensor);
  double sum = 0;
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const double of_block = block_sum_of_squares<InFloat32, Type>(x + begin, n);
    sum += in_range(of_block) ? of_block : block_sum_of_squares<InFloat64, Type>(x + begin, n);
  }
  return sum;
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

// n elements from old and slopes on, written to x and, where grad_factor is not 1, to g; halves: of each element and up
// to 15 more, or null. Past the end zeros are perturbed to zeros, whatever the half. Returns whether Sums held the
// sums.
template <class Sums, class Type, class Grad>
bool perturb_block(double* sums, typename Type::Stored* x, typename Grad::Stored* g, const typename Type::Stored* old,
                   const typename Grad::Stored* slopes, int64_t n, const uint16_t* halves, float scale,
                   float grad_factor, Dtype seen) {
  Sums dot, applied, intended;
  Ints moved[kVectors] = {};
  // clang-format off: it would indent the body below the attribute
  const auto perturb_16 = [&](typename Type::Stored* x, typename Grad::Stored* g, const typename Type::Stored* old,
                              const typename Grad::Stored* slopes, const uint16_t* halves)
      __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * REDIT_LANES;
      Floats before = Type::load(old + at);
      const Floats slope = Grad::load(slopes + at), wanted = slope * scale;
      if (grad_factor != 1) put(Grad{}, g + at, slope * grad_factor, nullptr);
      Floats now = put(Type{}, x + at, before + wanted, halves ? halves + at : nullptr);
      if (seen != dtype_of(Type{})) before = seen_as(seen, before), now = seen_as(seen, now);
      moved[v] -= now != before;
      add_products(dot, v, now - before, wanted);
      add_products(applied, v, now - before, now - before);
      add_products(intended, v, wanted, wanted);
    }
  };
  // clang-format on
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) perturb_16(x + i, g + i, old + i, slopes + i, halves ? halves + i : nullptr);
  if (i < n) {
    const size_t rest = size_t(n - i);
    typename Type::Stored last_x[kLanes], last_old[kLanes] = {};
    typename Grad::Stored last_g[kLanes], last_slopes[kLanes] = {};
    __builtin_memcpy(last_old, old + i, rest * sizeof *x);
    __builtin_memcpy(last_slopes, slopes + i, rest * sizeof *g);
    perturb_16(last_x, last_g, last_old, last_slopes, halves ? halves + i : nullptr);
    __builtin_memcpy(x + i, last_x, rest * sizeof *x);
    if (grad_factor != 1) __builtin_memcpy(g + i, last_g, rest * sizeof *g);
  }
  sums[0] = total(dot), sums[1] = total(applied), sums[2] = total(intended), sums[3] = 0;
  for (const Ints& count : moved)
    for (int i = 0; i < REDIT_LANES; ++i) sums[3] += count[i];
  return in_range(sums[2]) && (sums[3] == 0 || in_range(sums[1]));
}

template <class Type, class Grad>
void perturb_and_add(double* sums, typename Type::Stored* x, typename Grad::Stored* g, int64_t n,
                     const uint16_t* halves, float scale, float grad_factor, Dtype seen) {
  alignas(64) typename Type::Stored old[kBlock];
  alignas(64) typename Grad::Stored slopes[kBlock];
  __builtin_memcpy(old, x, size_t(n) * sizeof *x);
  if (grad_factor != 1) __builtin_memcpy(slopes, g, size_t(n) * sizeof *g);
  const auto* from = grad_factor != 1 ? slopes : g;
  double of_block[4];
  if (!perturb_block<InFloat32, Type, Grad>(of_block, x, g, old, from, n, halves, scale, grad_factor, seen))
    perturb_block<InFloat64, Type, Grad>(of_block, x, g, old, from, n, halves, scale, grad_factor, seen);
  for (int k = 0; k < 4; ++k) sums[k] += of_block[k];
}

template <class Type>
void perturb(double* sums, const Perturbation& args, int64_t tensor, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  const PerturbOptions& options = args.options;
  const Array& grad = args.grads[tensor];
  const int64_t offset = args.offsets[tensor];
  auto* x = static_cast<Stored*>(args.params[tensor].data);
  for (int k = 0; k < 4; ++k) sums[k] = 0;
  const float scale = float(*args.scale), factor = float(options.grad_factor);
  const Dtype seen = options.compute_dtype < 0 ? dtype_of(Type{}) : Dtype(options.compute_dtype);
  alignas(64) uint16_t halves[kBlock + 8 + 8 * kCalls];
  alignas(64) float buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock, first = offset + begin;
    const uint16_t* of_element = nullptr;
    if (options.rounding == Rounding::stochastic && sizeof(Stored) == 2) {
      philox_halves(halves, (first % 8 + n + 7) / 8, uint64_t(first / 8), options.seed, uint32_t(*args.step));
      of_element = halves + first % 8;
    }
    if (grad.dtype == dtype_of(Type{}))
      perturb_and_add<Type, Type>(sums, x + begin, static_cast<Stored*>(grad.data) + begin, n, of_element, scale,
                                  factor, seen);
    else {
      perturb_and_add<Type, Float32>(sums, x + begin, load(buffer, grad, begin, n), n, of_element, scale, 1, seen);
      scale_block(grad, begin, n, options.grad_factor);
    }
  }
}

// Returns whether Sums held the sums.
template <class Sums, class Type>
bool combine_block(double* sums, const typename Type::Stored* firsts, const typename Type::Stored* seconds,
                   typename Type::Stored* g, int64_t n, float rest, float share) {
  using Stored = typename Type::Stored;
  Sums second, gaps, combined;
  const auto combine_16 = [&](const Stored* firsts, const Stored* seconds, Stored* g) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * REDIT_LANES;
      const Floats g1 = Type::load(firsts + at), g2 = Type::load(seconds + at), gap = g2 - g1;
      const Floats both = put(Type{}, g + at, rest * g1 + share * g2, nullptr);
      add_products(second, v, g2, g2);
      add_products(gaps, v, gap, gap);
      add_products(combined, v, both, both);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) combine_16(firsts + i, seconds + i, g + i);
  if (i < n) {
    const size_t bytes = size_t(n - i) * sizeof *g;
    Stored last_firsts[kLanes] = {}, last_seconds[kLanes] = {}, last_g[kLanes];
    __builtin_memcpy(last_firsts, firsts + i, bytes);
    __builtin_memcpy(last_seconds, seconds + i, bytes);
    combine_16(last_firsts, last_seconds, last_g);
    __builtin_memcpy(g + i, last_g, bytes);
  }
  sums[0] = total(second), sums[1] = total(gaps), sums[2] = total(combined);
  return in_range(sums[0]) && in_range(sums[1]) && in_range(sums[2]);
}

template <class Type>
void combine(double* sums, const Array& first, const Array& grad, int64_t begin, int64_t end, double ratio) {
  using Stored = typename Type::Stored;
  const float share = float(ratio), rest = float(1 - ratio);
  for (int k = 0; k < 3; ++k) sums[k] = 0;
  alignas(64) Stored seconds[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const auto* firsts = static_cast<const Stored*>(first.data) + begin;
    auto* g = static_cast<Stored*>(grad.data) + begin;
    __builtin_memcpy(seconds, g, size_t(n) * sizeof *g);
    double of_block[3];
    if (!combine_block<InFloat32, Type>(of_block, firsts, seconds, g, n, rest, share))
      combine_block<InFloat64, Type>(of_block, firsts, seconds, g, n, rest, share);
    for (int k = 0; k < 3; ++k) sums[k] += of_block[k];
  }
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

void perturb_doubles(double* sums, const Perturbation& args, int64_t tensor, int64_t begin, int64_t end) {
  const PerturbOptions& options = args.options;
  const Array& grad = args.grads[tensor];
  auto* x = static_cast<double*>(args.params[tensor].data);
  const double scale = *args.scale;
  const Dtype seen = options.compute_dtype < 0 ? Dtype::float64 : Dtype(options.compute_dtype);
  alignas(64) double buffer[kBlock], lanes[4][kLanes] = {};
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const double* g = load(buffer, grad, begin, n);
    for (int64_t i = 0; i < n; ++i) {
      const double old = x[begin + i], intended = scale * g[i], now = old + intended;
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
