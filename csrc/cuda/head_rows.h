// Rows of the head on a GPU: what linear_loss.cu and linear_loss_product.cu share. kernels/linear_loss.py is the twin
// in Triton.
#pragma once

#include "cuda/device.h"
#include "cuda/linear_loss.h"
#include "shared/row_math.h"

namespace redit {

constexpr float kFar = 57.70780163555854f;  // 40 log2 e
constexpr float kInf = __builtin_huge_valf();

REDIT_DEVICE bool is_number(float total) { return total > 0 && total < kInf; }

REDIT_DEVICE float float_of_bfloat16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

// Element i of an array of float32, bfloat16 or float16.
REDIT_DEVICE float element(const void* data, int64_t i, Dtype type) {
  if (type == Dtype::float32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Dtype::bfloat16 ? float_of_bfloat16(bits) : device::float_of_float16(bits);
}
REDIT_DEVICE void set_element(void* data, int64_t i, Dtype type, float x) {
  if (type == Dtype::float32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] =
        uint16_t(type == Dtype::bfloat16 ? device::pack_bfloat16(x, 0) : device::pack_float16(x, 0));
}

// y(x) - y(anchor), in powers of 2.
template <bool capped>
REDIT_DEVICE float gap(float x, float anchor, const TransformConstants& t) {
  return (squash<capped>(x, t) - squash<capped>(anchor, t)) * t.outer;
}

// Over the lanes that differ in the bits below `lanes`; every one of them gets it.
template <int lanes>
REDIT_DEVICE float max_over(float x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) x = device::max_nan(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}
template <int lanes>
REDIT_DEVICE float sum_over(float x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// A thread's `count` columns of kPart of a row, which it has together with the `lanes` - 1 next to it. x: the logits
// in, what E holds of them out. left_out(i): there is no such column, or it is the target's; x[i] out is of no use. A
// part with a logit more than 40 above the row's anchor is seen from its largest instead, so that nothing overflows;
// `finish` brings all parts to one anchor. Sums are of eight in a tree, then of the eights in order, then of the lanes.
template <bool sums, bool capped, int lanes, int count, class LeftOut>
REDIT_DEVICE HeadPart exponentials(float (&x)[count], const HeadRow& row, bool some, LeftOut left_out,
                                   const TransformConstants& t) {
  HeadPart part{0, 0, -kInf, row.anchor};
  if (some) {  // rare, and two comparisons an element
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (left_out(i)) x[i] = -kInf;
  }
  if (sums) {
#pragma unroll
    for (int i = 0; i < count; ++i) part.largest = device::max_nan(part.largest, x[i]);
    part.largest = max_over<lanes>(part.largest);
    if (!(gap<capped>(part.largest, row.anchor, t) <= kFar) && row.anchor == row.anchor) part.anchor = part.largest;
    if (part.anchor == -kInf) part.anchor = 0;  // all are -inf, and e is 0
  }
  const float from = squash<capped>(part.anchor, t);
#pragma unroll
  for (int first = 0; first < count; first += 8) {
    float e[8], weighted[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float u = capped && left_out(first + i) ? -kInf : squash<capped>(x[first + i], t);
      const float y = device::max_nan((u - from) * t.outer, -200);  // there e is 0: e y is never 0 times infinity
      e[i] = device::exp2_approx(y);
      weighted[i] = e[i] * y;
      x[first + i] = e[i] * (sums ? row.constant : row.constant + row.by_gap * y);
      if (capped) x[first + i] *= fmaf(-u, u, 1.0f);
    }
    if constexpr (sums) {
#pragma unroll
      for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int i = 0; i < 8; i += 2 * step) e[i] += e[i + step], weighted[i] += weighted[i + step];
      part.others += e[0], part.weighted += weighted[0];
    }
  }
  if (sums) part.others = sum_over<lanes>(part.others), part.weighted = sum_over<lanes>(part.weighted);
  return part;
}

}  // namespace redit
