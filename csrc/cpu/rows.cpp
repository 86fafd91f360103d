// The row kernels for every instruction set.

#include "rows.h"

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

void copy_row(Dtype type, void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t count) {
  if (type == Dtype::float32)
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

}  // namespace redit
