// Up to 16 panels of 64 columns of b are packed in blocks of 512 along k, pairs of k side by side (64 KB a panel, in
// L2), and met by 96 rows of a at a time, which are packed too: rows that lie 4 KB apart are in the same set of L1.
//
// AVX512_BF16: one instruction adds 16 pairs of products, twice the speed of float32. Six rows at a time: 24 sums, 4
// registers of b and 1 of a are 29 of the 32.
//
// AMX_BF16: one instruction adds 16 pairs to each of 16 x 16 sums, 16 times as many in 16 cycles. 32 rows and 32
// columns at a time: 4 tiles of sums, 2 of a and 2 of b are all 8, and an instruction needs one tile read.
//
// Memory: a is read once a thread and 16 panels, b once, c once a block.

#include "product.h"

#include <cstring>
#include <memory>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own shuffles
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
// GCC 11, clang 12. Linux asks to be asked for the tiles.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define REDIT_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace redit {

#if defined(__x86_64__)

namespace {

constexpr int kPanel = 64, kVectors = kPanel / 16;
constexpr int64_t kDepth = 512, kStep = 32;  // along k: of a block, of a tile
constexpr int64_t kBlock = 96, kMostPanels = 16;
constexpr int64_t kPacked = kDepth / 2 * kPanel;  // pairs of a panel

const uint16_t* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const uint16_t*>(matrix.data) + row * matrix.row_stride + column * matrix.column_stride;
}

uint32_t pair(const Matrix& matrix, int64_t row, int64_t column, int64_t next_row, int64_t next_column) {
  const bool there = next_row < matrix.rows && next_column < matrix.columns;
  return *at(matrix, row, column) | (there ? uint32_t(*at(matrix, next_row, next_column)) << 16 : 0);
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16,prefer-vector-width=512")
#endif
namespace kernels_avx512_bf16 {

inline __mmask16 lanes(int64_t count) { return __mmask16(count >= 16 ? 0xFFFF : (1u << (count < 0 ? 0 : count)) - 1); }
inline __mmask32 halves(int64_t count) { return count >= 32 ? ~0u : (1u << (count < 0 ? 0 : count)) - 1; }

// Row i of the 16 becomes lane i.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quarters of 128 bits
    const __m512i even = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), odd = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    y[i] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    y[8 + i] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    y[12 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Pair p, column j of the panel: b[first + 2p][column + j] in the low half, the next row's in the high; 0 outside, up
// to a multiple of 16 pairs.
void pack(uint32_t* packed, const Matrix& b, int64_t first, int64_t depth, int64_t column) {
  const int64_t columns = std::min<int64_t>(kPanel, b.columns - column);
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t steps = std::min(kStep, depth - k);
    uint32_t* to = packed + k / 2 * kPanel;
    if (b.row_stride == 1) {
      for (int j = 0; j < kPanel; j += 16) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i)
          x[i] = j + i < columns ? _mm512_maskz_loadu_epi16(halves(steps), at(b, first + k, column + j + i))
                                 : _mm512_setzero_si512();
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kPanel + j, x[i]);
      }
      continue;
    }
    for (int64_t p = 0; p < kStep; p += 2, to += kPanel) {
      const int64_t row = first + k + p;
      if (p >= steps) {
        std::memset(to, 0, sizeof(uint32_t) * kPanel);
      } else if (b.column_stride == 1) {
        const __m512i low_half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                                  38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(16));
        const bool whole = row + 1 < b.rows;
        for (int half = 0; half < kPanel; half += 32) {
          const __mmask32 mask = halves(columns - half);
          const uint16_t* from = at(b, row, column) + half;
          const __m512i even = _mm512_maskz_loadu_epi16(mask, from);
          const __m512i odd = _mm512_maskz_loadu_epi16(whole ? mask : 0, whole ? from + b.row_stride : from);
          _mm512_storeu_si512(to + half, _mm512_permutex2var_epi16(even, low_half, odd));
          _mm512_storeu_si512(to + half + 16, _mm512_permutex2var_epi16(even, high_half, odd));
        }
      } else {
        for (int64_t j = 0; j < kPanel; ++j) to[j] = j < columns ? pair(b, row, column + j, row + 1, column + j) : 0;
      }
    }
  }
}

// Rows of a; 0 beyond the depth, up to a multiple of 32.
void pack_rows(uint16_t* packed, const Matrix& a, int64_t row, int64_t rows, int64_t first, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t steps = std::min(kStep, depth - k);
    if (a.row_stride == 1) {
      for (int64_t r = 0; r < rows; r += 16) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) {
          __m512i both[2];
          for (int odd = 0; odd < 2; ++odd)
            both[odd] = 2 * i + odd < steps ? _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(
                                                  lanes(rows - r), at(a, row + r, first + k + 2 * i + odd))))
                                            : _mm512_setzero_si512();
          x[i] = _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16));
        }
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + (r + i) * kDepth + k, x[i]);
      }
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* to = packed + r * kDepth + k;
      if (a.column_stride == 1) {
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(halves(steps), at(a, row + r, first + k)));
      } else {
        for (int64_t step = 0; step < kStep; ++step) to[step] = step < steps ? *at(a, row + r, first + k + step) : 0;
      }
    }
  }
}

template <int rows>
void meet(float* c, int64_t c_stride, bool add, const uint16_t* a, const uint32_t* packed, int64_t pairs,
          int64_t columns) {
  __m512 sums[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] =
          add ? _mm512_maskz_loadu_ps(lanes(columns - 16 * v), c + r * c_stride + 16 * v) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, packed += kPanel) {
    __m512bh vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = (__m512bh)_mm512_loadu_si512(packed + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * kDepth + 2 * p, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, vectors[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(c + r * c_stride + 16 * v, lanes(columns - 16 * v), sums[r][v]);
}

void meet_panel(float* c, int64_t c_stride, bool add, int64_t rows, int64_t columns, const uint16_t* a,
                const uint32_t* packed, int64_t depth) {
  constexpr int most = 6;
  constexpr decltype(&meet<1>) meets[most + 1] = {nullptr, meet<1>, meet<2>, meet<3>, meet<4>, meet<5>, meet<6>};
  for (int64_t row = 0; row < rows; row += most)
    meets[std::min<int64_t>(most, rows - row)](c + row * c_stride, c_stride, add, a + row * kDepth, packed,
                                               (depth + 1) / 2, columns);
}

}  // namespace kernels_avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(REDIT_TILES)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
namespace kernels_avx512_amx {

constexpr int kSide = 32;  // rows and columns of a block of c

struct Shape {  // what ldtilecfg reads: eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Shape) == 64, "as the processor reads it");
const Shape kShape;

void begin() { _tile_loadconfig(&kShape); }
void end() { _tile_release(); }

void copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to + r * to_stride, from + r * from_stride, size_t(columns) * sizeof(float));
}

// All 32 rows of a are there, and the depth is a multiple of 32.
void meet(float* c, int64_t c_stride, bool add, int64_t rows, int64_t columns, const uint16_t* a,
          const uint32_t* packed, int64_t depth) {
  alignas(64) float edge[kSide * kSide] = {};
  const bool whole = rows == kSide && columns == kSide;
  if (!whole && add) copy(edge, kSide, c, c_stride, rows, columns);
  float* sums = whole ? c : edge;
  const int64_t stride = whole ? c_stride : kSide, below = 16 * stride;
  asm volatile("" ::: "memory");  // GCC does not know that a tile is read from memory: stores before it stay before
  if (add) {
    _tile_loadd(0, sums, 4 * stride);
    _tile_loadd(1, sums + 16, 4 * stride);
    _tile_loadd(2, sums + below, 4 * stride);
    _tile_loadd(3, sums + below + 16, 4 * stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kStep, packed += kStep / 2 * kPanel) {
    _tile_loadd(4, a + k, 2 * kDepth);
    _tile_loadd(6, packed, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, packed + 16, 4 * kPanel);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * kDepth + k, 2 * kDepth);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * stride);
  _tile_stored(1, sums + 16, 4 * stride);
  _tile_stored(2, sums + below, 4 * stride);
  _tile_stored(3, sums + below + 16, 4 * stride);
  if (!whole) copy(c, c_stride, edge, kSide, rows, columns);
}

void meet_panel(float* c, int64_t c_stride, bool add, int64_t rows, int64_t columns, const uint16_t* a,
                const uint32_t* packed, int64_t depth) {
  for (int64_t column = 0; column < columns; column += kSide)
    for (int64_t row = 0; row < rows; row += kSide)
      meet(c + row * c_stride + column, c_stride, add, std::min<int64_t>(kSide, rows - row),
           std::min<int64_t>(kSide, columns - column), a + row * kDepth, packed + column,
           (depth + kStep - 1) / kStep * kStep);
}

}  // namespace kernels_avx512_amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool has_tiles() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long ask_for = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, for all threads of the process
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
         syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
}
#else
namespace kernels_avx512_amx {

void begin() {}
void end() {}
constexpr auto meet_panel = kernels_avx512_bf16::meet_panel;

}  // namespace kernels_avx512_amx

bool has_tiles() { return false; }
#endif

}  // namespace

int own_products() {
  static const int found = best_level() < 2 || !__builtin_cpu_supports("avx512bf16") ? 0 : has_tiles() ? 2 : 1;
  return found;
}

void product(float* c, int64_t c_stride, bool add, const Matrix& a, const Matrix& b, bool tiles, int threads) {
  const int64_t panels = (b.columns + kPanel - 1) / kPanel;
  const int64_t group = std::min(kMostPanels, std::max<int64_t>(1, (panels + threads - 1) / threads));
  const auto meet_panel = tiles ? kernels_avx512_amx::meet_panel : kernels_avx512_bf16::meet_panel;
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<uint32_t[]> packed(new uint32_t[size_t(group * kPacked)]);
    const std::unique_ptr<uint16_t[]> packed_rows(new uint16_t[kBlock * kDepth]);
    if (tiles) kernels_avx512_amx::begin();
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < panels; begin += group)
      for (int64_t first = 0; first < a.columns; first += kDepth) {
        const int64_t depth = std::min(kDepth, a.columns - first), end = std::min(panels, begin + group);
        for (int64_t panel = begin; panel < end; ++panel)
          kernels_avx512_bf16::pack(packed.get() + (panel - begin) * kPacked, b, first, depth, panel * kPanel);
        for (int64_t row = 0; row < a.rows; row += kBlock) {
          const int64_t rows = std::min(kBlock, a.rows - row);
          kernels_avx512_bf16::pack_rows(packed_rows.get(), a, row, rows, first, depth);
          for (int64_t panel = begin; panel < end; ++panel)
            meet_panel(c + row * c_stride + panel * kPanel, c_stride, add || first > 0, rows,
                       std::min<int64_t>(kPanel, b.columns - panel * kPanel), packed_rows.get(),
                       packed.get() + (panel - begin) * kPacked, depth);
        }
      }
    if (tiles) kernels_avx512_amx::end();
  }
}

#else

int own_products() { return 0; }

void product(float*, int64_t, bool, const Matrix&, const Matrix&, bool, int) {}

#endif

}  // namespace redit
