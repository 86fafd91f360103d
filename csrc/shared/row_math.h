// The scalar end of a row of logits, for the token losses and the head; redit_fast/backends/reference/token_loss.py is
// the definition, kernels/row_math.py the twin in Triton.
//
// e_j = exp(z_j - z_t), logp = -log1p(sum of e_j over j != t): no maximum is needed first, and 1 - p_t does not cancel.
// A row whose sum exceeds e^40 or is not finite is redone with its largest logit as anchor.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/args.h"

namespace redit {

constexpr int64_t kIgnore = -100;                 // a target that is not scored
constexpr float kRepair = 2.353852668370200e17f;  // e^40
constexpr float kNaN = __builtin_nanf("");
constexpr double kLn2 = 0.6931471805599453;

struct RowSums {
  float others;    // sum_{j != t} e_j
  float weighted;  // sum_{j != t} e_j y_j, y = (z - z_anchor) log2(e), where it was asked for
};

struct Row {  // everything that the gradient needs of a row
  float anchor, others, total, target, logp, entropy;
};

struct Slopes {
  float constant, by_gap;  // the gradient is e (constant + by_gap y) dz/dx
};

REDIT_HD bool stray(int64_t target, int64_t vocabulary) { return target < 0 || target >= vocabulary; }

REDIT_HD bool needs_repair(float anchor, float others) { return !(others <= kRepair) || !std::isfinite(anchor); }

// The target's z - z_anchor and dz/dx: in double, since a repaired row can have thousands between the two.
struct GapSlope {
  double gap, slope;
};

REDIT_HD GapSlope gap_slope(float x, float anchor, const TransformConstants& t) {
  if (!t.capped) return {(double(x) - double(anchor)) * t.slope, t.slope};
  const double tangent = std::tanh(double(x) * t.inner);
  return {(tangent - std::tanh(double(anchor) * t.inner)) * t.outer * kLn2, (1 - tangent * tangent) * t.slope};
}

// `anchor` is `target`, or the largest logit where the row was repaired.
REDIT_HD Row finish(float anchor, float target, const RowSums& sums, const TransformConstants& t) {
  const double offset = anchor == target && std::isfinite(target) ? 0 : gap_slope(target, anchor, t).gap;
  const double e_target = std::exp(offset);
  const double total = sums.others + e_target, log_total = offset == 0 ? std::log1p(sums.others) : std::log(total);
  const double by_target = e_target == 0 ? 0.0 : e_target * offset;
  return {anchor,
          sums.others,
          float(total),
          target,
          float(offset - log_total),
          float(log_total - (sums.weighted * kLn2 + by_target) / total)};
}

// g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j, is e_j (constant + by_gap y_j) dz/dx_j for j != t, times
// `factor` here.
REDIT_HD Slopes slopes_of(const Row& row, float g, float h, double factor, const TransformConstants& t) {
  const double surprise = h == 0 ? 0 : double(row.entropy) - std::log(double(row.total));
  return {float((-g - h * surprise) * t.slope * factor), float(-h * kLn2 * t.slope * factor)};
}

// The target's own, where (s - e_t) / s is 1 - p_t without cancellation.
REDIT_HD float gradient_at_target(const Row& row, float g, float h, double factor, const TransformConstants& t) {
  const GapSlope at = gap_slope(row.target, row.anchor, t);
  const double e = std::exp(at.gap), surprise = double(row.entropy) - std::log(double(row.total));
  const double by_entropy = h == 0 || e == 0 ? 0.0 : h * e * (at.gap + surprise);
  return float((double(g) * row.others - by_entropy) * at.slope * factor);
}

}  // namespace redit
