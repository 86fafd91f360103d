// Rows of logits on the CPU: what the token loss and the head share; shared/row_math.h is their scalar end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "shared/row_math.h"

namespace redit {

struct Processor {     // of redit_fast/backends/cpu/module.py
  int threads, level;  // level 0 baseline, 1 AVX2, 2 AVX-512
};

struct Run {
  Dtype type;
  TransformConstants transform;
  int threads, level;
};

int best_level();  // the highest that this processor runs

struct TileSums {
  RowSums sums;
  float largest;
};

struct RowKernels {  // see token_rows.h
  float (*read)(const void* row, int64_t column);
  void (*write)(void* row, int64_t column, float value);
  RowSums (*sums)(const void* row, int64_t vocabulary, int64_t target, float anchor, bool weigh,
                  const TransformConstants& transform);
  float (*largest)(const void* row, int64_t vocabulary);
  void (*gradient)(void* out, const void* row, int64_t vocabulary, int64_t target, float at_target, float anchor,
                   const Slopes& slopes, const TransformConstants& transform);
  void (*scale)(void* row, int64_t count, float factor);
  float (*dot)(const void* a, const void* b, int64_t count);
  TileSums (*exponentials)(void* out, const float* tile, int64_t count, int64_t target, float anchor,
                           const Slopes& slopes, const TransformConstants& transform);
};

const RowKernels& row_kernels(const Run& run);

inline char* row_of(const Matrix& matrix, int64_t row, const Run& run) {
  return static_cast<char*>(matrix.data) + row * matrix.row_stride * size_of(run.type);
}

void copy_row(Dtype type, void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t count);

// The row itself where its elements are neighbours, else a copy in `scratch`.
const void* contiguous_row(const Matrix& matrix, int64_t row, const Run& run, void* scratch);

// Asks for 2 MB pages under an output that may not have been touched: faults on 4 KB pages take 40 of the 60 ms of a
// fresh gradient of 131 MB.
void advise_huge_pages(const Matrix& matrix, const Run& run);

inline void store_row(const RowResults& out, int64_t r, const Row& row) {
  out.logp[r] = row.logp;
  if (out.entropy) out.entropy[r] = row.entropy;
  float* sums = static_cast<float*>(out.sums.data) + r;
  sums[0] = row.anchor;
  sums[out.sums.row_stride] = row.others;
  sums[2 * out.sums.row_stride] = row.total;
}

// What store_row kept; the target's logit is not among it.
inline Row kept_row(const RowUpstream& in, int64_t r) {
  const float* sums = static_cast<const float*>(in.sums.data) + r;
  return {sums[0], sums[in.sums.row_stride], sums[2 * in.sums.row_stride], 0, 0, in.grad_entropy ? in.entropy[r] : 0};
}

constexpr int64_t kElementsPerThread = 16384;  // about 10 us of work; forking a team costs 5 to 10

// body(row, scratch) for every row: runs of up to 16 rows in turn to the threads, which evens out masked stretches.
// scratch holds a row of `scratch_elements`, one per thread.
template <class Body>
void for_each_row(int64_t rows, int64_t columns, int64_t scratch_elements, const Run& run, Body body) {
  const int threads =
      int(std::max<int64_t>(1, std::min({int64_t(run.threads), rows, rows * columns / kElementsPerThread})));
  const int64_t share = std::clamp<int64_t>(rows / (4 * threads), 1, 16);
  std::vector<uint32_t> scratch(size_t(threads * scratch_elements));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread)
    for (int64_t first = thread * share; first < rows; first += threads * share)
      for (int64_t row = first; row < std::min(rows, first + share); ++row)
        body(row, static_cast<void*>(scratch.data() + thread * scratch_elements));
}

}  // namespace redit
