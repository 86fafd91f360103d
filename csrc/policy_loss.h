// The per-token policy loss and its derivative; redit_fast/losses.py::token_coefficients is the definition, float32 and
// with its order of operations.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define REDIT_LOSS_HD __host__ __device__ inline
#else
#define REDIT_LOSS_HD inline
#endif

namespace redit {

struct PolicyLoss {
  bool cispo, ratio_corrected;
  float low, high, bound, beta;  // bound: delta, or infinity
};

struct LossSlope {
  float loss, slope;  // l and dl/dlogp
};

REDIT_LOSS_HD float clamped(float x, float low, float high) {  // NaN stays; low above high gives high, as torch.clamp
  x = x < low ? low : x;
  return x > high ? high : x;
}

// torch.min halves its gradient at a tie and clamp passes it at the bounds.
REDIT_LOSS_HD LossSlope token_coefficient(const PolicyLoss& config, float logp, float advantage, float old_logp,
                                          float ref_logp) {
  const float log_ratio = logp - old_logp;
  const bool inside = std::fabs(log_ratio) <= 20.0f;
  const float ratio = std::exp(clamped(log_ratio, -20.0f, 20.0f));
  float loss, slope;
  if (config.cispo) {
    slope = -clamped(ratio, config.low, config.high) * advantage;
    loss = slope * logp;
  } else {
    const float unclipped = (ratio > config.bound ? config.bound : ratio) * advantage;
    const float clipped = clamped(ratio, config.low, config.high) * advantage;
    const float share = unclipped < clipped ? 1.0f : (unclipped == clipped ? 0.5f : 0.0f);
    const float passed = share * float(ratio <= config.bound) +
                         (1.0f - share) * float(config.low <= ratio && ratio <= config.high);
    loss = unclipped < clipped || unclipped != unclipped ? -unclipped : -clipped;  // NaN stays
    slope = -advantage * ratio * float(inside) * passed;
  }
  if (config.beta != 0) {
    const float raw = ref_logp - logp, difference = clamped(raw, -20.0f, 20.0f), growth = std::expm1(difference);
    float k3 = growth - difference, k3_slope = -growth * float(std::fabs(raw) <= 20.0f);
    if (config.ratio_corrected) {
      k3_slope = ratio * (k3_slope + k3 * float(inside));
      k3 = k3 * ratio;
    }
    loss += config.beta * k3;
    slope += config.beta * k3_slope;
  }
  return {loss, slope};
}

}  // namespace redit
