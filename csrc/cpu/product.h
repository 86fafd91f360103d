// Products of bfloat16 matrices with float32 sums and results, which torch does not have on the CPU.
#pragma once

#include "rows.h"

namespace redit {

int own_products();  // 0: none, 1: by AVX512_BF16, 2: also by AMX_BF16

// c (m, n) float32, its rows c_stride apart, becomes a (m, k) times b (k, n), bfloat16 of any strides, or has it added.
// Every element is summed along k in pairs, in order: its bits depend on its row and its column alone. tiles:
// AMX_BF16's.
void product(float* c, int64_t c_stride, bool add, const Matrix& a, const Matrix& b, bool tiles, int threads);

}  // namespace redit
