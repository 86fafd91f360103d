// Log-probs and losses from logits (R, V), float32, bfloat16 or float16, with any strides.
#pragma once

#include <cstdint>

#include "shared/policy_loss.h"
#include "rows.h"

namespace redit {

struct TokenForward {     // outputs (R,); sums[i * sums_stride + r]: the anchor, sum_{j != t} e_j and sum_j e_j
  float *logp, *entropy;  // entropy may be null
  float* sums;
  int64_t sums_stride;
};

void token_logp(const TokenForward& out, const Matrix& logits, const int64_t* targets, const Run& run);

void token_logp_grad(const Matrix& grad, const Matrix& logits, const int64_t* targets, const float* sums,
                     int64_t sums_stride, const float* grad_logp, const float* grad_entropy, const float* entropy,
                     const Run& run);

struct TokenLoss {  // (R,); old_logp null: on policy; ref_logp null: no KL; sampling_logp null: no correction
  const float *weights, *advantages, *old_logp, *ref_logp, *sampling_logp;
  PolicyLoss config;
  float grad_scale;
};

void token_loss(float* loss, float* logp, float* entropy, const Matrix& grad, const Matrix& logits,
                const int64_t* targets, const TokenLoss& in, const Run& run);  // grad.data null: no gradient

void scale_in_place(const Matrix& x, float factor, const Run& run);

}  // namespace redit
