// Token log-probs and losses; redit_fast/backends/reference/token_loss.py is the definition.
//
// e_j = exp(z_j - z_t), logp = -log1p(sum of e_j over j != t): no maximum is needed first, and 1 - p_t does not cancel.
// A row whose sum exceeds e^40 or is not finite is redone with its largest logit as anchor.
// Memory: forward reads every logit once; with gradient a row (128 KB at V = 32000) is read again from the L2 cache,
// right after its sums, and written once. Rows are independent: the bits do not depend on the number of threads.

#include "token_loss.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace redit {
namespace {

constexpr int64_t kIgnore = -100;
constexpr float kRepair = 2.353852668370200e17f;  // e^40
constexpr double kLn2 = 0.6931471805599453;
constexpr int64_t kElementsPerThread = 16384;     // about 10 us of work; forking a team costs 5 to 10

struct RowSums {
  float others, weighted;  // sum_{j != t} e_j and sum_{j != t} e_j y_j, y = (z - z_anchor) log2(e)
};

struct Slopes {
  float constant, by_gap;  // the gradient is e (constant + by_gap y) dz/dx
};

struct RowKernels {
  float (*read)(const void* row, int64_t column);
  RowSums (*sums)(const void* row, int64_t vocabulary, int64_t target, float anchor, const Transform& transform);
  float (*largest)(const void* row, int64_t vocabulary);
  void (*gradient)(void* out, const void* row, int64_t vocabulary, int64_t target, float at_target, float anchor,
                   const Slopes& slopes, const Transform& transform);
  void (*scale)(void* row, int64_t count, float factor);
};

// One source for every instruction set, selected at run time. Compiler target attributes rather than a library such as
// Highway: no dependency, one binary, and GCC and clang both have them. The namespaces name the instruction set, so
// that a test can tell from the symbols that no other function uses it.
#define REDIT_LANES 4
namespace rows_baseline {
#include "token_rows.h"
}
#undef REDIT_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define REDIT_LANES 8
namespace rows_avx2 {
#include "token_rows.h"
}
#undef REDIT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define REDIT_LANES 16
namespace rows_avx512 {
#include "token_rows.h"
}
#undef REDIT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const RowKernels& kernels(const Run& run) {
  const int type = int(run.type), capped = run.transform.capped;
#if defined(__x86_64__)
  if (run.level == 2) return rows_avx512::kKernels[type][capped];
  if (run.level == 1) return rows_avx2::kKernels[type][capped];
#endif
  return rows_baseline::kKernels[type][capped];
}

int64_t size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

template <class Stored>
void copy_strided(Stored* to, int64_t to_stride, const Stored* from, int64_t from_stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j * to_stride] = from[j * from_stride];
}

void copy_row(ElementType type, void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t count) {
  if (type == ElementType::float32)
    copy_strided(static_cast<uint32_t*>(to), to_stride, static_cast<const uint32_t*>(from), from_stride, count);
  else
    copy_strided(static_cast<uint16_t*>(to), to_stride, static_cast<const uint16_t*>(from), from_stride, count);
}

char* row_of(const Matrix& matrix, int64_t row, const Run& run) {
  return static_cast<char*>(matrix.data) + row * matrix.row_stride * size_of(run.type);
}

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

struct Row {  // everything that the gradient needs of a row
  float anchor, others, total, target, logp, entropy;
};

// The target's z - z_anchor and dz/dx: in double, since a repaired row can have thousands between the two.
struct GapSlope {
  double gap, slope;
};

GapSlope gap_slope(float x, float anchor, const Transform& t) {
  if (!t.capped) return {(double(x) - double(anchor)) * t.slope, t.slope};
  const double tangent = std::tanh(double(x) * t.inner);
  return {(tangent - std::tanh(double(anchor) * t.inner)) * t.outer * kLn2, (1 - tangent * tangent) * t.slope};
}

const void* contiguous_row(const Matrix& logits, int64_t row, const Run& run, void* scratch) {
  const void* x = row_of(logits, row, run);
  if (logits.column_stride == 1) return x;
  copy_row(run.type, scratch, 1, x, logits.column_stride, logits.columns);
  return scratch;
}

bool stray(int64_t target, int64_t vocabulary) { return target < 0 || target >= vocabulary; }

Row forward(const void* x, int64_t vocabulary, int64_t target, const Run& run) {
  const RowKernels& kernel = kernels(run);
  if (stray(target, vocabulary)) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {nan, nan, nan, nan, nan, nan};
  }
  const float at_target = kernel.read(x, target);
  float anchor = at_target;
  RowSums sums = kernel.sums(x, vocabulary, target, anchor, run.transform);
  double offset = 0, e_target = 1;
  if (!(sums.others <= kRepair) || !std::isfinite(anchor)) {
    anchor = kernel.largest(x, vocabulary);
    sums = kernel.sums(x, vocabulary, target, anchor, run.transform);
    offset = gap_slope(at_target, anchor, run.transform).gap;
    e_target = std::exp(offset);
  }
  const double total = sums.others + e_target, log_total = offset == 0 ? std::log1p(sums.others) : std::log(total);
  const double by_target = e_target == 0 ? 0.0 : e_target * offset;
  return {anchor,
          sums.others,
          float(total),
          at_target,
          float(offset - log_total),
          float(log_total - (sums.weighted * kLn2 + by_target) / total)};
}

// g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j; (s - e_t) / s is 1 - p_t without cancellation.
void backward(const Matrix& grad, int64_t row, const void* x, int64_t target, const Row& in, float g, float h,
              const Run& run, void* scratch) {
  const RowKernels& kernel = kernels(run);
  char* out = row_of(grad, row, run);
  void* dense = grad.column_stride == 1 ? out : scratch;
  if (g == 0 && h == 0 && std::isfinite(in.total)) {
    std::fill_n(static_cast<char*>(dense), grad.columns * size_of(run.type), char(0));
  } else {
    const double total = in.total, slope = run.transform.slope, surprise = double(in.entropy) - std::log(total);
    const Slopes slopes{float((-g - h * (h == 0 ? 0 : surprise)) * slope / total), float(-h * kLn2 * slope / total)};
    const bool missing = stray(target, grad.columns);
    float at_target = 0;
    if (!missing) {
      const GapSlope t = gap_slope(in.target, in.anchor, run.transform);
      const double p = std::exp(t.gap) / total;
      const double by_entropy = h == 0 || p == 0 ? 0.0 : h * p * (t.gap + surprise);
      at_target = float((g * (in.others / total) - by_entropy) * t.slope);
    }
    kernel.gradient(dense, x, grad.columns, missing ? -1 : target, at_target, in.anchor, slopes, run.transform);
  }
  if (dense != out) copy_row(run.type, out, grad.column_stride, dense, 1, grad.columns);
}

void clear(const Matrix& grad, int64_t row, const Run& run, void* scratch) {
  backward(grad, row, nullptr, 0, Row{}, 0, 0, run, scratch);
}

int64_t scratch_elements(const Matrix& logits, const Matrix& grad) {
  return logits.column_stride == 1 && (!grad.data || grad.column_stride == 1) ? 0 : logits.columns;
}

}  // namespace

int best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
#endif
  return 0;
}

void token_logp(const TokenForward& out, const Matrix& logits, const int64_t* targets, const Run& run) {
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, {}), run, [&](int64_t r, void* scratch) {
    Row row{};
    if (targets[r] != kIgnore)
      row = forward(contiguous_row(logits, r, run, scratch), logits.columns, targets[r], run);
    out.logp[r] = row.logp;
    if (out.entropy) out.entropy[r] = row.entropy;
    out.sums[r] = row.anchor;
    out.sums[out.sums_stride + r] = row.others;
    out.sums[2 * out.sums_stride + r] = row.total;
  });
}

void token_logp_grad(const Matrix& grad, const Matrix& logits, const int64_t* targets, const float* sums,
                     int64_t sums_stride, const float* grad_logp, const float* grad_entropy, const float* entropy,
                     const Run& run) {
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, grad), run, [&](int64_t r, void* scratch) {
    if (targets[r] == kIgnore) return clear(grad, r, run, scratch);
    Row row{sums[r], sums[sums_stride + r], sums[2 * sums_stride + r], 0, 0, grad_entropy ? entropy[r] : 0};
    const void* x = contiguous_row(logits, r, run, scratch);
    if (!stray(targets[r], logits.columns)) row.target = kernels(run).read(x, targets[r]);
    backward(grad, r, x, targets[r], row, grad_logp[r], grad_entropy ? grad_entropy[r] : 0, run, scratch);
  });
}

void token_loss(float* loss, float* logp, float* entropy, const Matrix& grad, const Matrix& logits,
                const int64_t* targets, const TokenLoss& in, const Run& run) {
  std::vector<float> row_losses(size_t(logits.rows));
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, grad), run, [&](int64_t r, void* scratch) {
    if (targets[r] == kIgnore) {
      logp[r] = entropy[r] = 0;
      if (grad.data) clear(grad, r, run, scratch);
      return;
    }
    const void* x = contiguous_row(logits, r, run, scratch);
    const Row row = forward(x, logits.columns, targets[r], run);
    logp[r] = row.logp;
    entropy[r] = row.entropy;
    const float old_logp = in.old_logp ? in.old_logp[r] : row.logp, ref_logp = in.ref_logp ? in.ref_logp[r] : 0;
    const float sampling_logp = in.sampling_logp ? in.sampling_logp[r] : 0;
    const LossSlope token =
        token_coefficient(in.config, row.logp, in.advantages[r], old_logp, ref_logp, sampling_logp);
    row_losses[r] = in.weights[r] * token.loss;
    if (grad.data) backward(grad, r, x, targets[r], row, in.weights[r] * token.slope * in.grad_scale, 0, run, scratch);
  });
  double sum = 0;
  for (float row_loss : row_losses) sum += double(row_loss);
  *loss = float(sum);
}

void scale_in_place(const Matrix& x, float factor, const Run& run) {
  if (factor == 1) return;
  constexpr int64_t kSpan = 32768;
  const int64_t spans = (x.columns + kSpan - 1) / kSpan, width = std::min(x.columns, kSpan);
  const int64_t scratch_size = x.column_stride == 1 ? 0 : width;
  for_each_row(x.rows * spans, width, scratch_size, run, [&](int64_t index, void* scratch) {
    const int64_t first = index % spans * kSpan, count = std::min(kSpan, x.columns - first);
    char* span = row_of(x, index / spans, run) + first * x.column_stride * size_of(run.type);
    if (x.column_stride == 1) return kernels(run).scale(span, count, factor);
    copy_row(run.type, scratch, 1, span, x.column_stride, count);
    kernels(run).scale(scratch, count, factor);
    copy_row(run.type, span, x.column_stride, scratch, 1, count);
  });
}

}  // namespace redit
