// One row of logits: its sums, its largest element, its gradient. levels.h includes this file once for every
// instruction set, inside a namespace whose name carries it. A row's sums run over 32 lanes (column mod 32) in chunks
// of 256 columns and are combined in one order: the same bits with every vector width, address and neighbour.
// Memory: sums and largest read the row; gradient reads it from the cache and writes it.

#include "simd.h"

constexpr int kBlock = 32, kVectors = kBlock / REDIT_LANES;
// 8 additions a lane, then one without error to the total: equal logits would make 128 additions drift by 2e-6, which
// the entropy of a target 26 below them multiplies to 6e-5.
constexpr int64_t kChunk = 256;

// y = (z - z_anchor) log2 e, and dz/dx up to the constant slope. The subtraction comes first: a common shift cancels.
template <bool capped>
REDIT_INLINE Floats gap(Floats x, float anchor, const TransformConstants& t, Floats& bend) {
  if (!capped) return (x - anchor) * t.outer;
  const Floats tangent = hyperbolic_tangent(x * t.inner);
  bend = 1.0f - tangent * tangent;
  return (tangent - anchor) * t.outer;  // the anchor comes as a tanh
}

template <bool capped>
REDIT_INLINE float squash(float anchor, const TransformConstants& t) {
  return capped ? hyperbolic_tangent(splat(anchor * t.inner))[0] : anchor;
}

template <class Type>
REDIT_INLINE float element(const void* row, int64_t column) {
  typename Type::Stored lanes[REDIT_LANES] = {};
  lanes[0] = static_cast<const typename Type::Stored*>(row)[column];
  return Type::load(lanes)[0];
}

template <class Type>
float read(const void* row, int64_t column) {
  return element<Type>(row, column);
}

template <class Type>
void write(void* row, int64_t column, float value) {
  typename Type::Stored lanes[REDIT_LANES];
  Type::store(lanes, splat(value));
  static_cast<typename Type::Stored*>(row)[column] = lanes[0];
}

// The lines of a block that comes 2 KB later: the sums run at the speed of the exponentials and that of memory, not at
// their sum.
template <class Stored>
REDIT_INLINE void prefetch(const Stored* block) {
  const char* later = reinterpret_cast<const char*>(block) + 2048;
  for (size_t line = 0; line < kBlock * sizeof(Stored); line += 64) __builtin_prefetch(later + line);
}

// sum + lost is the exact sum of what was added (Knuth's two-sum).
struct ExactSum {
  Floats sum, lost;

  inline __attribute__((always_inline)) void add(Floats x) {
    const Floats total = sum + x, part = total - sum;
    lost += (sum - (total - part)) + (x - part);
    sum = total;
  }
};

// NaN stays. Sets y to its bounds, so that e y is never 0 times infinity.
REDIT_INLINE Floats bounded_power(Floats& y) {
  y = bounded(y);
  return power_of_two(y);
}

template <class Type, bool capped, bool weigh>
REDIT_INLINE RowSums sums_of(const void* row, int64_t vocabulary, int64_t target, float logit,
                             const TransformConstants& t) {
  const auto* x = static_cast<const typename Type::Stored*>(row);
  const float anchor = squash<capped>(logit, t);
  ExactSum others[kVectors] = {}, weighted[kVectors] = {};
  Floats bend;
  const int64_t target_block = target < 0 ? -1 : target / kBlock * kBlock;
  for (int64_t chunk = 0; chunk < vocabulary; chunk += kChunk) {
    Floats chunk_others[kVectors] = {}, chunk_weighted[kVectors] = {};
    const int64_t stop = chunk + kChunk < vocabulary ? chunk + kChunk : vocabulary;
    const int64_t tail = chunk + (stop - chunk) / kBlock * kBlock;
    const auto add = [&](int v, Floats y) __attribute__((always_inline)) {
      const Floats e = bounded_power(y);
      chunk_others[v] += e;
      if (weigh) chunk_weighted[v] = multiply_add(e, y, chunk_weighted[v]);
    };
    const auto whole = [&](int64_t j, int64_t end) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (; j < end; j += kBlock) {
        prefetch(x + j);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) add(v, gap<capped>(Type::load(x + j + v * REDIT_LANES), anchor, t, bend));
      }
    };
    const auto part = [&](int64_t j) __attribute__((always_inline)) {
      typename Type::Stored block[kBlock] = {};
      float y[kBlock];
      const int64_t count = stop - j < kBlock ? stop - j : kBlock;
      __builtin_memcpy(block, x + j, size_t(count) * sizeof *x);
      for (int v = 0; v < kVectors; ++v)
        Float32::store(y + v * REDIT_LANES, gap<capped>(Type::load(block + v * REDIT_LANES), anchor, t, bend));
      for (int64_t i = count; i < kBlock; ++i) y[i] = -__builtin_inff();
      if (j == target_block) y[target - j] = -__builtin_inff();
      for (int v = 0; v < kVectors; ++v) add(v, Float32::load(y + v * REDIT_LANES));
    };
    const bool here = chunk <= target_block && target_block < stop;
    whole(chunk, here ? target_block : tail);
    if (here) {
      part(target_block);
      whole(target_block + kBlock, tail);
    }
    if (tail < stop && tail != target_block) part(tail);
    for (int v = 0; v < kVectors; ++v) {
      others[v].add(chunk_others[v]);
      if (weigh) weighted[v].add(chunk_weighted[v]);
    }
  }
  double other_sum = 0, weighted_sum = 0;
  for (int v = 0; v < kVectors; ++v)
    for (int l = 0; l < REDIT_LANES; ++l) {
      other_sum += double(others[v].sum[l]) + double(others[v].lost[l]);
      weighted_sum += double(weighted[v].sum[l]) + double(weighted[v].lost[l]);
    }
  return {float(other_sum), float(weighted_sum)};
}

template <class Type, bool capped>
RowSums sums(const void* row, int64_t vocabulary, int64_t target, float anchor, bool weigh,
             const TransformConstants& t) {
  return weigh ? sums_of<Type, capped, true>(row, vocabulary, target, anchor, t)
               : sums_of<Type, capped, false>(row, vocabulary, target, anchor, t);
}

// Of all elements that are not NaN (a NaN reaches the row's sums without help).
template <class Type>
float largest(const void* row, int64_t vocabulary) {
  const auto* x = static_cast<const typename Type::Stored*>(row);
  Floats top = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + REDIT_LANES <= vocabulary; j += REDIT_LANES) {
    const Floats value = Type::load(x + j);
    top = value > top ? value : top;
  }
  float result = -__builtin_inff();
  for (int l = 0; l < REDIT_LANES; ++l) result = top[l] > result ? top[l] : result;
  for (; j < vocabulary; ++j) {
    const float value = element<Type>(row, j);
    result = value > result ? value : result;
  }
  return result;
}

// out = e (constant + by_gap y) dz/dx; the target's column is the caller's number. out may be the row.
template <class Type, bool capped>
void gradient(void* out, const void* row, int64_t vocabulary, int64_t target, float at_target, float logit,
              const Slopes& slopes, const TransformConstants& t) {
  const auto* x = static_cast<const typename Type::Stored*>(row);
  auto* g = static_cast<typename Type::Stored*>(out);
  const float anchor = squash<capped>(logit, t);
  const auto lanes = [&](typename Type::Stored* to, const typename Type::Stored* from) __attribute__((always_inline)) {
    Floats bend, y = gap<capped>(Type::load(from), anchor, t, bend);
    Floats e = bounded_power(y);
    if (capped) e *= bend;
    Type::store(to, e * multiply_add(y, splat(slopes.by_gap), splat(slopes.constant)));
  };
  int64_t j = 0;
  for (; j + kBlock <= vocabulary; j += kBlock)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lanes(g + j + v * REDIT_LANES, x + j + v * REDIT_LANES);
  if (j < vocabulary) {
    typename Type::Stored block[kBlock] = {};
    __builtin_memcpy(block, x + j, size_t(vocabulary - j) * sizeof *x);
    for (int v = 0; v < kVectors; ++v) lanes(block + v * REDIT_LANES, block + v * REDIT_LANES);
    __builtin_memcpy(g + j, block, size_t(vocabulary - j) * sizeof *x);
  }
  if (target >= 0) write<Type>(g, target, at_target);
}

template <class Type>
void scale(void* row, int64_t count, float factor) {
  auto* x = static_cast<typename Type::Stored*>(row);
  int64_t j = 0;
  for (; j + REDIT_LANES <= count; j += REDIT_LANES) Type::store(x + j, Type::load(x + j) * factor);
  for (; j < count; ++j) write<Type>(x, j, element<Type>(x, j) * factor);
}

template <class Type>
float dot(const void* a_row, const void* b_row, int64_t count) {
  const auto* a = static_cast<const typename Type::Stored*>(a_row);
  const auto* b = static_cast<const typename Type::Stored*>(b_row);
  Floats lanes[kVectors] = {};
  int64_t j = 0;
  for (; j + kBlock <= count; j += kBlock)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      lanes[v] = multiply_add(Type::load(a + j + v * REDIT_LANES), Type::load(b + j + v * REDIT_LANES), lanes[v]);
  double sum = 0;
  for (int v = 0; v < kVectors; ++v)
    for (int l = 0; l < REDIT_LANES; ++l) sum += double(lanes[v][l]);
  for (; j < count; ++j) sum += double(element<Type>(a, j)) * double(element<Type>(b, j));
  return float(sum);
}

// A tile of a row of the head, float32: its sums without the target's column, its largest element with it; and where
// out is given out = e (constant + by_gap y) dz/dx in Type. A tile is at most 1024 columns.
template <class Type, bool capped>
TileSums exponentials(void* out, const float* tile, int64_t count, int64_t target, float logit, const Slopes& slopes,
                      const TransformConstants& t) {
  auto* to = static_cast<typename Type::Stored*>(out);
  const float anchor = squash<capped>(logit, t);
  Floats others[kVectors] = {}, weighted[kVectors] = {}, top = splat(-__builtin_inff());
  const auto lanes = [&](int v, typename Type::Stored* stored, const float* x, Ints keep)
                         __attribute__((always_inline)) {
                           const Floats value = Float32::load(x);
                           Floats bend, y = gap<capped>(value, anchor, t, bend);
                           Floats e = (Floats)((Ints)bounded_power(y) & keep);
                           top = value > top ? value : top;
                           others[v] += e;
                           weighted[v] = multiply_add(e, y, weighted[v]);
                           if (!stored) return;
                           if (capped) e *= bend;
                           Type::store(stored, e * multiply_add(y, splat(slopes.by_gap), splat(slopes.constant)));
                         };
  const int64_t target_block = target < 0 ? -1 : target / kBlock * kBlock;
  for (int64_t j = 0; j < count; j += kBlock) {
    if (j != target_block && j + kBlock <= count) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j + v * REDIT_LANES;
        lanes(v, out ? to + at : nullptr, tile + at, ~Ints{});
      }
      continue;
    }
    const int64_t columns = count - j < kBlock ? count - j : kBlock;
    float block[kBlock];
    int32_t keep[kBlock];
    typename Type::Stored stored[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      block[i] = tile[j + (i < columns ? i : 0)];
      keep[i] = i < columns && j + i != target ? -1 : 0;
    }
    for (int v = 0; v < kVectors; ++v) {
      Ints kept;
      __builtin_memcpy(&kept, keep + v * REDIT_LANES, sizeof kept);
      lanes(v, stored + v * REDIT_LANES, block + v * REDIT_LANES, kept);
    }
    if (out) __builtin_memcpy(to + j, stored, size_t(columns) * sizeof *stored);
  }
  double other_sum = 0, weighted_sum = 0;
  float largest = -__builtin_inff();
  for (int v = 0; v < kVectors; ++v)
    for (int l = 0; l < REDIT_LANES; ++l) other_sum += double(others[v][l]), weighted_sum += double(weighted[v][l]);
  for (int l = 0; l < REDIT_LANES; ++l) largest = top[l] > largest ? top[l] : largest;
  return {{float(other_sum), float(weighted_sum)}, largest};
}

template <class Type, bool capped>
constexpr RowKernels kernels() {
  return {&read<Type>,  &write<Type>, &sums<Type, capped>,        &largest<Type>, &gradient<Type, capped>,
          &scale<Type>, &dot<Type>,   &exponentials<Type, capped>};
}

constexpr RowKernels kKernels[3][2] = {{kernels<Float32, false>(), kernels<Float32, true>()},
                                       {kernels<BFloat16, false>(), kernels<BFloat16, true>()},
                                       {kernels<Float16, false>(), kernels<Float16, true>()}};

#undef REDIT_INLINE
