// The dtypes that tensors come in; redit_fast/backends/args.py has them in the same order.
#pragma once

#include <cstdint>

#include "shared/macros.h"

namespace redit {

// Logits, hidden states and weights: the first three; parameters: the first four.
REDIT_CHOICE(Dtype, float32, bfloat16, float16, float64, int64, boolean)

REDIT_HD int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::boolean:
      return 1;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    case Dtype::float32:
      return 4;
    default:
      return 8;
  }
}

}  // namespace redit
