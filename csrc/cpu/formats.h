// Element formats: bfloat16 and float16 as uint16_t, converted by integer and float32 operations without branches, so
// that compilers vectorise them at every instruction set and the bits are the same everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define REDIT_INLINE __forceinline
#else
#define REDIT_INLINE inline __attribute__((always_inline))  // into functions compiled for another instruction set
#endif

namespace redit {

REDIT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

REDIT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

REDIT_INLINE float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

// To nearest, ties to even; NaN becomes 0x7FC0, as in PyTorch.
REDIT_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

REDIT_INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7FFFu) << 13, sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x38000000u : 0u;  // inf and NaN: exponent 31 becomes 255
  const float normal = float_of(magnitude + 0x38000000u + special);      // exponent bias 15 becomes 127
  // (1 + m / 1024) 2^-14 - 2^-14 = m 2^-24
  const float subnormal = float_of(magnitude + 0x38800000u) - float_of(0x38800000u);
  return float_of(sign | bits_of(magnitude < 0x00800000u ? subnormal : normal));
}

// To nearest, ties to even, overflow to infinity.
REDIT_INLINE uint16_t to_float16(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has an ulp of 2^-24, so adding it rounds
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;  // NaN, or at least 65520
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t((sign >> 16) | (magnitude >= 0x477FF000u ? large : finite));
}

}  // namespace redit
