// The per-token policy loss and its derivative; redit_fast/losses/coefficients.py::token_coefficients is the
// definition, float32 and with its order of operations.
#pragma once

#include <cmath>

#include "shared/args.h"

namespace redit {

struct LossSlope {
  float loss, slope;  // l and dl/dlogp
};

REDIT_HD float clamped(float x, float low, float high) {  // NaN stays; low above high gives high, as torch.clamp
  x = x < low ? low : x;
  return x > high ? high : x;
}

REDIT_HD float clamped_exp(float x) { return std::exp(clamped(x, -20.0f, 20.0f)); }

REDIT_HD float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// torch.min halves its gradient at a tie and clamp passes it at the bounds; NaN stays.
REDIT_HD LossSlope clipped_coefficient(const PolicyConstants& c, float ratio, float advantage, bool inside) {
  const float unclipped = (ratio > c.delta ? c.delta : ratio) * advantage;
  const float clipped = clamped(ratio, c.low, c.high) * advantage;
  const float share = unclipped < clipped ? 1.0f : (unclipped == clipped ? 0.5f : 0.0f);
  const float passed = share * float(ratio <= c.delta) + (1.0f - share) * float(c.low <= ratio && ratio <= c.high);
  float loss = unclipped < clipped || unclipped != unclipped ? -unclipped : -clipped;
  float slope = -advantage * ratio * float(inside) * passed;
  if (advantage < 0) {
    const float most = -c.dual_clip * advantage;
    slope *= loss < most ? 1.0f : (loss == most ? 0.5f : 0.0f);
    loss = loss > most ? most : loss;
  }
  return {loss, slope};
}

REDIT_HD bool dppo_trusts(const PolicyConstants& c, float logp, float old_logp, float advantage) {
  const float p = std::exp(logp), p_old = std::exp(old_logp);
  if (c.form == LossForm::dppo_tv) return advantage > 0 ? p - p_old <= c.high : p - p_old >= c.low;
  const float tiny = 1e-8f, others = std::log((1.0f - p_old + tiny) / (1.0f - p + tiny));
  const float divergence = p_old * (old_logp - logp) + (1.0f - p_old) * others;
  return advantage > 0 ? divergence <= c.high || p <= p_old : divergence <= -c.low || p >= p_old;
}

REDIT_HD LossSlope policy_coefficient(const PolicyConstants& c, float logp, float advantage, float old_logp,
                                      float log_ratio, float ratio, bool inside) {
  float slope;
  switch (c.form) {
    case LossForm::reinforce:
      slope = -advantage;
      break;
    case LossForm::dro:
      return {-advantage * logp + 0.5f * c.dro_beta * (log_ratio * log_ratio), c.dro_beta * log_ratio - advantage};
    case LossForm::cispo:
      slope = -clamped(ratio, c.low, c.high) * advantage;
      break;
    case LossForm::dppo_tv:
    case LossForm::dppo_kl:
      slope = -advantage * (ratio > 20.0f ? 20.0f : ratio) * float(dppo_trusts(c, logp, old_logp, advantage));
      break;
    case LossForm::sapo: {
      const float temperature = advantage > 0 ? c.sapo_temperature_pos : c.sapo_temperature_neg;
      const float x = temperature * (ratio - 1.0f), gate = sigmoid(x);
      return {-(4.0f / temperature) * gate * advantage, -4.0f * advantage * gate * sigmoid(-x) * ratio * float(inside)};
    }
    default:
      return clipped_coefficient(c, ratio, advantage, inside);
  }
  return {slope * logp, slope};
}

REDIT_HD float correction_weight(const PolicyConstants& c, float gap) {  // gap = old - sampling, NaN: unknown
  const float weight = clamped_exp(gap != gap ? 0.0f : gap);
  if (c.correction == TokenCorrection::token_truncate) return clamped(weight, c.correction_floor, c.correction_cap);
  return c.correction_floor <= weight && weight <= c.correction_cap ? weight : 0.0f;
}

REDIT_HD LossSlope kl_coefficient(Kl kl, float difference) {  // difference = ref - logp
  if (kl == Kl::k1) return {-difference, 1.0f};
  if (kl == Kl::k2) return {0.5f * (difference * difference), -difference};
  if (kl == Kl::abs) return {std::fabs(difference), float(difference < 0) - float(difference > 0)};
  const float limited = clamped(difference, -20.0f, 20.0f), growth = std::expm1(limited);
  return {growth - limited, -growth * float(std::fabs(difference) <= 20.0f)};
}

REDIT_HD LossSlope token_coefficient(const PolicyConstants& c, float logp, float advantage, float old_logp,
                                     float ref_logp, float sampling_logp) {
  const float log_ratio = logp - old_logp, ratio = clamped_exp(log_ratio);
  const bool inside = std::fabs(log_ratio) <= 20.0f;
  LossSlope out = policy_coefficient(c, logp, advantage, old_logp, log_ratio, ratio, inside);
  if (c.correction != TokenCorrection::none) {
    const float weight = correction_weight(c, old_logp - sampling_logp);
    out = {out.loss * weight, out.slope * weight};
  }
  if (c.beta != 0) {
    LossSlope kl = kl_coefficient(c.kl, ref_logp - logp);
    if (c.kl_ratio_correction) kl = {kl.loss * ratio, ratio * (kl.slope + kl.loss * float(inside))};
    out = {out.loss + c.beta * kl.loss, out.slope + c.beta * kl.slope};
  }
  return out;
}

}  // namespace redit
