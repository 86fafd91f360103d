// AVX512_BF16: one instruction adds 16 pairs of products, twice the speed of float32. A panel of 64 columns of b is
// packed in blocks of 512 along k, pairs of k side by side (64 KB, in L2), and met by the rows of a, six at a time: 24
// sums, 4 registers of b and 1 of a are 29 of the 32.
//
// Memory: a is read once a panel, b once, c once a block.

#include "product.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace redit {

#if defined(__x86_64__)

namespace {

constexpr int kRows = 6, kVectors = 4, kColumns = 16 * kVectors;
constexpr int64_t kDepth = 512;

const uint16_t* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const uint16_t*>(matrix.data) + row * matrix.row_stride + column * matrix.column_stride;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16,prefer-vector-width=512")
#endif
namespace kernels_avx512_bf16 {

inline __mmask16 lanes(int64_t count) { return __mmask16(count >= 16 ? 0xFFFF : (1u << (count < 0 ? 0 : count)) - 1); }

// Pair p, column j of the panel: b[first + 2p][column + j] in the low half, the next row's in the high; 0 outside.
void pack(uint32_t* packed, const Matrix& b, int64_t first, int64_t depth, int64_t column) {
  const int64_t columns = std::min<int64_t>(kColumns, b.columns - column);
  for (int64_t p = 0; p < depth; p += 2, packed += kColumns) {
    const bool whole = p + 1 < depth;
    if (b.column_stride == 1) {
      const __m512i low_half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                                6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(16));
      for (int half = 0; half < 2; ++half) {
        const int64_t left = columns - 32 * half;
        const __mmask32 mask = left >= 32 ? ~0u : (1u << (left < 0 ? 0 : left)) - 1;
        const uint16_t* row = at(b, first + p, column) + 32 * half;
        const __m512i even = _mm512_maskz_loadu_epi16(mask, row);
        const __m512i odd = _mm512_maskz_loadu_epi16(whole ? mask : 0, whole ? row + b.row_stride : row);
        _mm512_storeu_si512(packed + 32 * half, _mm512_permutex2var_epi16(even, low_half, odd));
        _mm512_storeu_si512(packed + 32 * half + 16, _mm512_permutex2var_epi16(even, high_half, odd));
      }
    } else if (b.row_stride == 1 && whole && b.column_stride < (1 << 25)) {
      const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i offsets = _mm512_mullo_epi32(steps, _mm512_set1_epi32(int(b.column_stride)));
      for (int v = 0; v < kVectors; ++v)
        _mm512_storeu_si512(packed + 16 * v,
                            _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes(columns - 16 * v), offsets,
                                                        at(b, first + p, column + 16 * v), 2));
    } else {
      for (int64_t j = 0; j < kColumns; ++j) {
        const uint32_t low = j < columns ? *at(b, first + p, column + j) : 0;
        packed[j] = low | (j < columns && whole ? uint32_t(*at(b, first + p + 1, column + j)) << 16 : 0);
      }
    }
  }
}

template <int rows>
void meet(float* c, int64_t c_stride, bool add, const uint16_t* a, int64_t a_stride, const uint32_t* packed,
          int64_t pairs, int64_t columns) {
  __m512 sums[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] =
          add ? _mm512_maskz_loadu_ps(lanes(columns - 16 * v), c + r * c_stride + 16 * v) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, packed += kColumns) {
    __m512bh vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = (__m512bh)_mm512_loadu_si512(packed + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, vectors[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(c + r * c_stride + 16 * v, lanes(columns - 16 * v), sums[r][v]);
}

}  // namespace kernels_avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

using Meet = void (*)(float*, int64_t, bool, const uint16_t*, int64_t, const uint32_t*, int64_t, int64_t);
constexpr Meet kMeet[kRows + 1] = {nullptr,
                                   kernels_avx512_bf16::meet<1>,
                                   kernels_avx512_bf16::meet<2>,
                                   kernels_avx512_bf16::meet<3>,
                                   kernels_avx512_bf16::meet<4>,
                                   kernels_avx512_bf16::meet<5>,
                                   kernels_avx512_bf16::meet<6>};

// Pairs along k must be neighbours, and k even: else rows are copied so, 0 at their end.
std::vector<uint16_t> paired(const Matrix& a, int threads) {
  const int64_t depth = a.columns + a.columns % 2;
  std::vector<uint16_t> rows(size_t(a.rows * depth));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < a.rows; first += 128)  // 256 bytes of a line of a transposed matrix at a time
    for (int64_t k = 0; k < a.columns; ++k)
      for (int64_t row = first; row < std::min(first + 128, a.rows); ++row)
        rows[size_t(row * depth + k)] = *at(a, row, k);
  return rows;
}

}  // namespace

bool has_product() { return best_level() == 2 && __builtin_cpu_supports("avx512bf16"); }

void product(float* c, int64_t c_stride, bool add, const Matrix& a, const Matrix& b, int threads) {
  const bool direct = a.column_stride == 1 && a.columns % 2 == 0;
  const std::vector<uint16_t> copy = direct ? std::vector<uint16_t>() : paired(a, threads);
  const uint16_t* rows = direct ? static_cast<const uint16_t*>(a.data) : copy.data();
  const int64_t stride = direct ? a.row_stride : a.columns + a.columns % 2;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> packed(size_t(kDepth / 2 * kColumns));
#pragma omp for schedule(static)
    for (int64_t column = 0; column < b.columns; column += kColumns)
      for (int64_t first = 0; first < a.columns; first += kDepth) {
        const int64_t depth = std::min(kDepth, a.columns - first);
        kernels_avx512_bf16::pack(packed.data(), b, first, depth, column);
        for (int64_t row = 0; row < a.rows; row += kRows)
          kMeet[std::min<int64_t>(kRows, a.rows - row)](c + row * c_stride + column, c_stride, add || first > 0,
                                                        rows + row * stride + first, stride, packed.data(),
                                                        (depth + 1) / 2, b.columns - column);
      }
  }
}

#else

bool has_product() { return false; }

void product(float*, int64_t, bool, const Matrix&, const Matrix&, int) {}

#endif

}  // namespace redit
