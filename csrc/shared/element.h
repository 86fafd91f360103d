// Per-element maths, once for C++ and CUDA; redit_fast/noise.py holds the same functions in PyTorch and is the
// definition. Every line keeps that file's order of operations and uses only + - * / sqrt and integer operations, so
// the bits are the same everywhere. Compile with -ffp-contract=off (nvcc: -fmad=false): a fused multiply-add would
// change them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "shared/args.h"

namespace redit {

struct Words {
  uint32_t x0, x1, x2, x3;
};

constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // added to the key after every round

struct Product {
  uint32_t low, high;
};

REDIT_HD Product product(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__  // where it carries on in 64 bits, with two more instructions a product
  return {x * y, __umulhi(x, y)};
#else
  const uint64_t both = uint64_t(x) * y;
  return {uint32_t(both), uint32_t(both >> 32)};
#endif
}

REDIT_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const Product p0 = product(c0, kPhiloxFactor0), p1 = product(c2, kPhiloxFactor1);
  c0 = p1.high ^ c1 ^ k0;
  c1 = p1.low;
  c2 = p0.high ^ c3 ^ k1;
  c3 = p0.low;
}

// Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (id lo, id hi, stream, step).
REDIT_HD Words philox4x32(uint64_t seed, int64_t id, uint32_t stream, uint32_t step) {
  uint32_t c0 = uint32_t(id), c1 = uint32_t(uint64_t(id) >> 32), c2 = stream, c3 = step;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) philox_round(c0, c1, c2, c3, k0, k1);
  return {c0, c1, c2, c3};
}

// The keys of all rounds, where many calls have one seed.
struct PhiloxKeys {
  uint32_t k0[10], k1[10];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1)
    keys.k0[round] = k0, keys.k1[round] = k1;
  return keys;
}

REDIT_HD Words philox4x32(const PhiloxKeys& keys, int64_t id, uint32_t stream, uint32_t step) {
  uint32_t c0 = uint32_t(id), c1 = uint32_t(uint64_t(id) >> 32), c2 = stream, c3 = step;
  for (int round = 0; round < 10; ++round) philox_round(c0, c1, c2, c3, keys.k0[round], keys.k1[round]);
  return {c0, c1, c2, c3};
}

// (0, 1) with 24 bits.
REDIT_HD double uniform(uint32_t x0) { return (double(int32_t(x0 >> 8)) + 0.5) * (1.0 / 16777216.0); }

// x, or -x where the last bit of `sign` is set.
REDIT_HD double signed_by(double x, uint64_t sign) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= sign << 63;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// sqrt(-2 ln u1) cos(theta), u1 = (2 x0 + 1) / 2^33, theta from x1. ln is an atanh series (error 2e-15). Without a
// branch, and with conversions from int32_t alone, so that compilers vectorise loops around it from SSE2 on.
REDIT_HD double box_muller(uint32_t x0, uint32_t x1) {
  const double v = 2.0 * (double(int32_t(x0 ^ 0x80000000u)) + 2147483648.0) + 1.0;  // exact: below 2^33
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  uint64_t fraction = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;  // of a number in [1, 2)
  const uint64_t above = (0x3FF6A09E667F3BCDull - fraction) >> 63;          // 1 above sqrt(2), which is halved
  fraction -= above << 52;
  double mantissa;  // v = mantissa * 2^exponent
  std::memcpy(&mantissa, &fraction, sizeof mantissa);
  const double exponent = double(int32_t((bits >> 52) + above) - 1023);
  const double t = (mantissa - 1.0) / (mantissa + 1.0), t2 = t * t;
  double series = 1.0 / 19.0;
  for (int k = 17; k > 0; k -= 2) series = series * t2 + 1.0 / double(k);
  const double log = 2.0 * t * series + (exponent - 33.0) * 0.6931471805599453;
  const double radius = std::sqrt(-2.0 * log);

  const double phase = ((double(int32_t(x1 & 0x3FFFFFFFu)) + 0.5) * (1.0 / 1073741824.0) - 0.5) * 1.5707963267948966;
  const double h = phase * phase;
  double sin = 1.0 / 6227020800.0;
  sin = sin * h + -1.0 / 39916800.0;
  sin = sin * h + 1.0 / 362880.0;
  sin = sin * h + -1.0 / 5040.0;
  sin = sin * h + 1.0 / 120.0;
  sin = sin * h + -1.0 / 6.0;
  sin = phase * (sin * h + 1.0);
  double cos = -1.0 / 87178291200.0;
  cos = cos * h + 1.0 / 479001600.0;
  cos = cos * h + -1.0 / 3628800.0;
  cos = cos * h + 1.0 / 40320.0;
  cos = cos * h + -1.0 / 720.0;
  cos = cos * h + 1.0 / 24.0;
  cos = cos * h + -1.0 / 2.0;
  cos = cos * h + 1.0;
  const uint64_t quadrant = x1 >> 30;  // theta = quadrant * pi/2 + pi/4 + phase
  const double value = (cos - signed_by(sin, quadrant)) / 1.4142135623730951;
  return radius * signed_by(value, quadrant ^ quadrant >> 1);
}

// The dither xi of spec section 1 from Philox's first two words: uniform on (-a, a), or gaussian with standard
// deviation a / sqrt(3).
REDIT_HD double noise(bool gaussian, double half_range, uint32_t x0, uint32_t x1) {
  if (!gaussian) return half_range * (2.0 * uniform(x0) - 1.0);
  return (half_range / 1.7320508075688772) * double(float(box_muller(x0, x1)));
}

template <class T>
struct AdamwScalars {  // see adamw_element.h
  T factor, lerp, other_lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step_size, decay;
  bool from_grad;  // torch.lerp starts from the nearer end
  // power1, power2: of the betas to the number of steps, this one included.
  REDIT_HD AdamwScalars(const AdamwOptions& options, double power1, double power2, double factor)
      : factor(T(factor)),
        lerp(T(1 - options.beta1)),
        other_lerp(lerp - T(1)),
        beta2(T(options.beta2)),
        one_minus_beta2(T(1 - options.beta2)),
        root_correction2(T(std::sqrt(1 - power2))),
        eps(T(options.eps)),
        minus_step_size(T(-(options.lr / (1 - power1)))),
        decay(T(1 - options.lr * options.weight_decay)),
        from_grad(!(lerp < T(0.5))) {}
};

}  // namespace redit
