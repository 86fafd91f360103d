// Rows of logits on a GPU: what token_loss.cu and token_loss_cluster.cu share.
//
// A row is vectors of 16 bytes that count from its first element, wherever that lies: the order of its sums, and so
// their bits, are the same at every address. Granules are the 16 bytes between multiples of 16 that a load moves.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/token_loss.h"
#include "shared/policy_loss.h"
#include "shared/row_math.h"

namespace redit {

using device::Vector;

struct Float32 {
  using Stored = uint32_t;
  static constexpr int kWide = 4, kLog = 2;  // elements of a vector, and their log2
  static constexpr Stored kMinusInf = 0xFF800000u;
  static REDIT_DEVICE float widen(Stored x) { return __uint_as_float(x); }
  static REDIT_DEVICE Stored narrow(float x) { return __float_as_uint(x); }
  static REDIT_DEVICE float at(const Vector& v, int i) { return __uint_as_float(v.word[i]); }
  static REDIT_DEVICE uint32_t word(const float* x, int i) { return __float_as_uint(x[i]); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int kWide = 8, kLog = 3;
  static constexpr Stored kMinusInf = 0xFF80u;
  static REDIT_DEVICE float widen(Stored x) { return __uint_as_float(uint32_t(x) << 16); }
  static REDIT_DEVICE Stored narrow(float x) { return Stored(device::pack_bfloat16(x, x)); }
  static REDIT_DEVICE float at(const Vector& v, int i) {
    return __uint_as_float(i % 2 ? v.word[i / 2] & 0xFFFF0000u : v.word[i / 2] << 16);
  }
  static REDIT_DEVICE uint32_t word(const float* x, int i) { return device::pack_bfloat16(x[2 * i], x[2 * i + 1]); }
};

struct Float16 {
  using Stored = uint16_t;
  static constexpr int kWide = 8, kLog = 3;
  static constexpr Stored kMinusInf = 0xFC00u;
  static REDIT_DEVICE float widen(Stored x) { return device::float_of_float16(x); }
  static REDIT_DEVICE Stored narrow(float x) { return Stored(device::pack_float16(x, x)); }
  static REDIT_DEVICE float at(const Vector& v, int i) {
    return device::float_of_float16(uint16_t(i % 2 ? v.word[i / 2] >> 16 : v.word[i / 2]));
  }
  static REDIT_DEVICE uint32_t word(const float* x, int i) { return device::pack_float16(x[2 * i], x[2 * i + 1]); }
};

template <class Type>
REDIT_DEVICE Vector packed(const float (&x)[Type::kWide]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = Type::word(x, i);
  return v;
}

// The 16 bytes that begin `words` words into a, and half a word more where shift % 4 is 2, and go on into b.
template <class Type, int words>
REDIT_DEVICE Vector joined(const Vector& a, const Vector& b, uint32_t shift) {
  const uint32_t word[] = {a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1], b.word[2], b.word[3]};
  Vector result;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    result.word[i] =
        Type::kWide == 4 ? word[words + i] : __funnelshift_r(word[words + i], word[words + i + 1], 8 * (shift & 2));
  return result;
}

// The same `shift` bytes into a, which no branch asks about.
template <class Type>
REDIT_DEVICE Vector joined(Vector a, Vector b, uint32_t shift) {
  if (shift & 8) a = {a.word[2], a.word[3], b.word[0], b.word[1]}, b = {b.word[2], b.word[3], 0, 0};
  if (shift & 4) a = {a.word[1], a.word[2], a.word[3], b.word[0]}, b = {b.word[1], b.word[2], b.word[3], 0};
  return joined<Type, 0>(a, b, shift);
}

// A target's column, or:
constexpr int kMasked = -2, kStray = -1;
REDIT_DEVICE int column_of(int64_t target, int vocabulary) {
  return target == kIgnore ? kMasked : stray(target, vocabulary) ? kStray : int(target);
}

// e = 2^y, y = (u - anchor) outer with both squashed. The subtraction comes first: a common shift cancels. y ends at
// -200, where e is 0: e y is never 0 times infinity. NaN stays.
template <bool capped>
struct Gap {
  const TransformConstants& t;
  float anchor;
  REDIT_DEVICE Gap(float logit, const TransformConstants& transform)
      : t(transform), anchor(squash<capped>(logit, transform)) {}
  REDIT_DEVICE float operator()(float u) const { return device::max_nan((u - anchor) * t.outer, -200.0f); }
};
// dz/dx of a squashed x, up to the slope.
REDIT_DEVICE float bend(float u) { return fmaf(-u, u, 1.0f); }

// Whether a vector has an element that does not count: the row's target, or what is beyond its end. Few do. Both are
// counted from the first element of vector 0.
template <class Type>
REDIT_DEVICE bool partial(int v, int target, int end) {
  return v == target >> Type::kLog || v >= end >> Type::kLog;
}
REDIT_DEVICE bool counts(int column, int target, int end) { return column != target && column < end; }

// The vector with -inf for what does not count, so that its e is 0 without a comparison an element.
template <class Type>
REDIT_DEVICE Vector counted(Vector x, int v, int target, int end) {
  constexpr int kBits = 128 / Type::kWide;
  if (partial<Type>(v, target, end)) {
#pragma unroll
    for (int i = 0; i < Type::kWide; ++i) {
      const uint32_t bits = uint32_t(typename Type::Stored(~0u)) << i * kBits % 32;
      uint32_t& word = x.word[i * kBits / 32];
      if (!counts(v * Type::kWide + i, target, end)) word = (word & ~bits) | (Type::kMinusInf << i * kBits % 32);
    }
  }
  return x;
}

// Adds the e and e y of a vector of `counted`, in pairs, to the thread's sums. e becomes e dz/dx. Under softcap
// tanh(-inf) is -1: there it is u that is -inf for what does not count, and its e dz/dx is of no use.
template <class Type, bool capped>
REDIT_DEVICE void add(RowSums& sums, float (&e)[Type::kWide], const Vector& x, int v, int target, int end,
                      const Gap<capped>& gap) {
  constexpr int kWide = Type::kWide;
  float u[kWide], y[kWide], s[kWide / 2], w[2];
#pragma unroll
  for (int i = 0; i < kWide; ++i) u[i] = squash<capped>(Type::at(x, i), gap.t);
  if (capped && partial<Type>(v, target, end)) {
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (!counts(v * kWide + i, target, end)) u[i] = -__builtin_inff();
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) y[i] = gap(u[i]), e[i] = device::exp2_approx(y[i]);
#pragma unroll
  for (int i = 0; i < kWide / 2; ++i) s[i] = e[2 * i] + e[2 * i + 1];
#pragma unroll
  for (int n = kWide / 4; n; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = s[2 * i] + s[2 * i + 1];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = half * kWide / 2;
    w[half] = e[first] * y[first];
#pragma unroll
    for (int i = first + 1; i < first + kWide / 2; ++i) w[half] = fmaf(e[i], y[i], w[half]);
  }
  sums.others += s[0], sums.weighted += w[0] + w[1];
  if (capped) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) e[i] *= bend(u[i]);
  }
}

// The larger of `top` and what is in a vector of `counted`. NaN is passed over: it reaches the sums without help.
template <class Type>
REDIT_DEVICE float largest(float top, const Vector& x) {
#pragma unroll
  for (int i = 0; i < Type::kWide; ++i) {
    const float value = Type::at(x, i);
    top = value > top ? value : top;
  }
  return top;
}

REDIT_DEVICE RowSums warp_sum(RowSums sums) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sums.others += __shfl_xor_sync(~0u, sums.others, step);
    sums.weighted += __shfl_xor_sync(~0u, sums.weighted, step);
  }
  return sums;
}
REDIT_DEVICE float warp_largest(float top) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const float other = __shfl_xor_sync(~0u, top, step);
    top = other > top ? other : top;
  }
  return top;
}

// A slice's sums of each warp. One warp adds them: lanes 0 to 15 the first ones, 16 to 31 the second ones.
struct WarpSums {
  float of[2][16];
  REDIT_DEVICE void put(float others, float weighted) {
    const int t = device::thread();
    if (t % 32 == 0) of[0][t / 32] = others, of[1][t / 32] = weighted;
  }
  REDIT_DEVICE float total(int warps) const {
    const int lane = device::thread() % 32;
    double x = lane % 16 < warps ? of[lane / 16][lane % 16] : 0.0;
#pragma unroll
    for (int step = 8; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return float(x);
  }
  REDIT_DEVICE float largest(int warps) const {
    const int lane = device::thread() % 32;
    return warp_largest(lane < warps ? of[0][lane] : -__builtin_inff());
  }
};

// What all threads must know of a row, beside its target's column, first and when one warp has finished it.
struct RowBegin {
  float at_target;
  float numbers[6];
};
struct RowEnd {
  float anchor;
  float constant, at_target;  // of the gradient
  bool again, zero;           // zero: so is the gradient
};

// What a row's coefficient is made of, by lane.
REDIT_DEVICE float row_number(const TokenLossLaunch& a, int64_t row, int which) {
  const LossRows& rows = a.op.rows;
  const float* from = which == 0   ? rows.weights
                      : which == 1 ? rows.advantages
                      : which == 2 ? rows.old_logp
                      : which == 3 ? rows.ref_logp
                      : which == 4 ? rows.sampling_logp
                                   : nullptr;
  return from ? from[row] : which == 5 && a.op.grad_scale ? *a.op.grad_scale : 1.0f;
}
REDIT_DEVICE float row_number(const TokenLogpLaunch&, int64_t, int) { return 0; }

// By one warp: the row's results, which the thread that `writes` stores, and its gradient's numbers.
REDIT_DEVICE RowEnd finish_row(const TokenLossLaunch& a, int64_t row, float anchor, float target, const RowSums& sums,
                               const float* of, bool writes) {
  const Row end = finish(anchor, target, sums, a.transform);
  const LossSlope token =
      token_coefficient(a.op.policy, end.logp, of[1], a.op.rows.old_logp ? of[2] : end.logp, of[3], of[4]);
  if (writes) {
    a.op.logp[row] = end.logp, a.op.entropy[row] = end.entropy;
    a.row_losses[row] = of[0] * token.loss;
  }
  const float g = of[0] * token.slope * of[5];
  const double factor = 1 / double(end.total);
  return {0, slopes_of(end, g, 0, factor, a.transform).constant, gradient_at_target(end, g, 0, factor, a.transform),
          false, g == 0 && std::isfinite(end.total)};
}

REDIT_DEVICE void store_row(const RowResults& out, int64_t row, const Row& end) {
  out.logp[row] = end.logp;
  if (out.entropy) out.entropy[row] = end.entropy;
  float* sums = static_cast<float*>(out.sums.data) + row;
  sums[0] = end.anchor, sums[out.sums.row_stride] = end.others, sums[2 * out.sums.row_stride] = end.total;
}

REDIT_DEVICE RowEnd finish_row(const TokenLogpLaunch& a, int64_t row, float anchor, float target, const RowSums& sums,
                               const float*, bool writes) {
  const Row end = finish(anchor, target, sums, a.transform);
  if (writes) store_row(a.op.out, row, end);
  return {};
}

// By one thread.
REDIT_DEVICE void finish_masked(const TokenLossLaunch& a, int64_t row) {
  a.op.logp[row] = a.op.entropy[row] = a.row_losses[row] = 0;
}
REDIT_DEVICE void finish_masked(const TokenLogpLaunch& a, int64_t row) { store_row(a.op.out, row, Row{}); }

// By one warp that has the row's sums: another turn, once, where they need a larger anchor; else the end.
template <class Launch>
REDIT_DEVICE RowEnd finish_or_repair(const Launch& a, int64_t row, bool repaired, float anchor, float target,
                                     const RowSums& sums, const float* numbers, bool writes) {
  if (!repaired && needs_repair(anchor, sums.others)) return {0, 0, 0, true, false};
  return finish_row(a, row, anchor, target, sums, numbers, writes);
}

template <class Stored>
REDIT_DEVICE Stored* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<Stored*>(matrix.data) + row * matrix.row_stride;
}

}  // namespace redit
