// Rows of logits: what the token loss and the head share. redit_fast/backends/reference/token_loss.py is the
// definition.
//
// e_j = exp(z_j - z_t), logp = -log1p(sum of e_j over j != t): no maximum is needed first, and 1 - p_t does not cancel.
// A row whose sum exceeds e^40 or is not finite is redone with its largest logit as anchor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace redit {

struct Matrix {  // strides in elements
  void* data;
  int64_t rows, columns, row_stride, column_stride;
};

struct Transform {  // z = softcap(logit_scale x) / temperature
  double slope;     // logit_scale / temperature
  float inner;      // logit_scale / softcap
  float outer;      // log2(e) / temperature times softcap, or logit_scale without one
  bool capped;
};

enum class ElementType { float32, bfloat16, float16 };

struct Run {
  ElementType type;
  Transform transform;
  int threads, level;  // level 0 baseline, 1 AVX2, 2 AVX-512
};

int best_level();  // the highest that this processor runs

struct RowSums {
  float others;    // sum_{j != t} e_j
  float weighted;  // sum_{j != t} e_j y_j, y = (z - z_anchor) log2(e), where it was asked for
};

struct TileSums {
  RowSums sums;
  float largest;
};

struct Slopes {
  float constant, by_gap;  // the gradient is e (constant + by_gap y) dz/dx
};

struct RowKernels {  // see token_rows.h
  float (*read)(const void* row, int64_t column);
  void (*write)(void* row, int64_t column, float value);
  RowSums (*sums)(const void* row, int64_t vocabulary, int64_t target, float anchor, bool weigh,
                  const Transform& transform);
  float (*largest)(const void* row, int64_t vocabulary);
  void (*gradient)(void* out, const void* row, int64_t vocabulary, int64_t target, float at_target, float anchor,
                   const Slopes& slopes, const Transform& transform);
  void (*scale)(void* row, int64_t count, float factor);
  float (*dot)(const void* a, const void* b, int64_t count);
  TileSums (*exponentials)(void* out, const float* tile, int64_t count, int64_t target, float anchor,
                           const Slopes& slopes, const Transform& transform);
};

const RowKernels& row_kernels(const Run& run);

inline int64_t size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

inline char* row_of(const Matrix& matrix, int64_t row, const Run& run) {
  return static_cast<char*>(matrix.data) + row * matrix.row_stride * size_of(run.type);
}

void copy_row(ElementType type, void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t count);

// The row itself where its elements are neighbours, else a copy in `scratch`.
const void* contiguous_row(const Matrix& matrix, int64_t row, const Run& run, void* scratch);

// Asks for 2 MB pages under an output that may not have been touched: faults on 4 KB pages take 40 of the 60 ms of a
// fresh gradient of 131 MB.
void advise_huge_pages(const Matrix& matrix, const Run& run);

constexpr float kNaN = __builtin_nanf("");
constexpr double kLn2 = 0.6931471805599453;

inline bool stray(int64_t target, int64_t vocabulary) { return target < 0 || target >= vocabulary; }

bool needs_repair(float anchor, float others);

struct Row {  // everything that the gradient needs of a row
  float anchor, others, total, target, logp, entropy;
};

// `anchor` is `target`, or the largest logit where the row was repaired.
Row finish(float anchor, float target, const RowSums& sums, const Transform& transform);

// The target's z - z_anchor and dz/dx: in double, since a repaired row can have thousands between the two.
struct GapSlope {
  double gap, slope;
};

GapSlope gap_slope(float x, float anchor, const Transform& transform);

// g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j, is e_j (constant + by_gap y_j) dz/dx_j for j != t, times
// `factor` here; and the target's own, where (s - e_t) / s is 1 - p_t without cancellation.
Slopes slopes_of(const Row& row, float g, float h, double factor, const Transform& transform);
float gradient_at_target(const Row& row, float g, float h, double factor, const Transform& transform);

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
