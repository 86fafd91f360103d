// Log-probs and losses from logits (R, V), float32, bfloat16 or float16, with any strides.
#pragma once

#include "rows.h"

namespace redit {

void token_logp(const TokenLogp& args, const Run& run);

void token_logp_grad(const TokenLogpGrad& args, const Run& run);

void token_loss(const TokenLoss& args, const Run& run);

void scale_in_place(const Matrix& x, float factor, const Run& run);

}  // namespace redit
