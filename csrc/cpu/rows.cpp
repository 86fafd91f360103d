// The row kernels for every instruction set, and the scalar end of a row.

#include "rows.h"

#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace redit {
namespace {

constexpr float kRepair = 2.353852668370200e17f;  // e^40

#define REDIT_KERNELS "token_rows.h"
#include "levels.h"

template <class Stored>
void copy_strided(Stored* to, int64_t to_stride, const Stored* from, int64_t from_stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j * to_stride] = from[j * from_stride];
}

}  // namespace

int best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const RowKernels& row_kernels(const Run& run) { return kernels(run.level)[int(run.type)][run.transform.capped]; }

void copy_row(ElementType type, void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t count) {
  if (type == ElementType::float32)
    copy_strided(static_cast<uint32_t*>(to), to_stride, static_cast<const uint32_t*>(from), from_stride, count);
  else
    copy_strided(static_cast<uint16_t*>(to), to_stride, static_cast<const uint16_t*>(from), from_stride, count);
}

const void* contiguous_row(const Matrix& matrix, int64_t row, const Run& run, void* scratch) {
  const void* x = row_of(matrix, row, run);
  if (matrix.column_stride == 1) return x;
  copy_row(run.type, scratch, 1, x, matrix.column_stride, matrix.columns);
  return scratch;
}

void advise_huge_pages(const Matrix& matrix, const Run& run) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const int64_t bytes = matrix.rows * matrix.row_stride * size_of(run.type);
  if (matrix.row_stride < matrix.columns || bytes < int64_t(2 * kHugePage)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(matrix.data), first = (begin + kHugePage - 1) & -kHugePage;
  const uintptr_t last = (begin + uintptr_t(bytes)) & -kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: what it returns does not matter
#endif
}

bool needs_repair(float anchor, float others) { return !(others <= kRepair) || !std::isfinite(anchor); }

GapSlope gap_slope(float x, float anchor, const Transform& t) {
  if (!t.capped) return {(double(x) - double(anchor)) * t.slope, t.slope};
  const double tangent = std::tanh(double(x) * t.inner);
  return {(tangent - std::tanh(double(anchor) * t.inner)) * t.outer * kLn2, (1 - tangent * tangent) * t.slope};
}

Row finish(float anchor, float target, const RowSums& sums, const Transform& t) {
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

Slopes slopes_of(const Row& row, float g, float h, double factor, const Transform& t) {
  const double surprise = h == 0 ? 0 : double(row.entropy) - std::log(double(row.total));
  return {float((-g - h * surprise) * t.slope * factor), float(-h * kLn2 * t.slope * factor)};
}

float gradient_at_target(const Row& row, float g, float h, double factor, const Transform& t) {
  const GapSlope at = gap_slope(row.target, row.anchor, t);
  const double e = std::exp(at.gap), surprise = double(row.entropy) - std::log(double(row.total));
  const double by_entropy = h == 0 || e == 0 ? 0.0 : h * e * (at.gap + surprise);
  return float((double(g) * row.others - by_entropy) * at.slope * factor);
}

}  // namespace redit
