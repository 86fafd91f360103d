// Passes over parameters; redit_fast/backends/reference/params.py is the definition.
//
// One parallel loop a pass over chunks of 64 K elements of all tensors. Sums are float64 partials a chunk, in a fixed
// number of lanes, added in the order of the chunks: their bits depend on neither threads nor instruction set.
// Memory per weight, float32 / bfloat16 with master: norm reads 4 / 2 bytes, perturb moves 12 / 6, AdamW 28 / 28.
//
// The object file is x86-64 baseline. Bodies below are inlined into three copies, compiled by target attributes for the
// baseline, AVX2 and AVX-512 and picked at run time: GCC and clang both have them, and they cost no dependency and no
// second object file. No FMA anywhere, so every copy gives the same bits.

#include "params.h"

#include <algorithm>
#include <cmath>

#include "element.h"

namespace redit {
namespace {

constexpr int64_t kChunk = 65536;  // elements: 256 KB of float32, and a fork-join (5-10 us) is small beside it
constexpr int64_t kBlock = 1024;   // elements converted at a time: buffers of 4 KB stay in the first-level cache
constexpr int kLanes = 16;
constexpr uint32_t kStreamRounding = 0x10000;

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> chunks_of(const Sizes& numels) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < numels.size(); ++t)
    for (int64_t begin = 0; begin < numels[t]; begin += kChunk)
      chunks.push_back({int64_t(t), begin, std::min(begin + kChunk, numels[t])});
  return chunks;
}

template <class Body>
void run_baseline(const Body& body, int64_t index, const Chunk& chunk) {
  body(index, chunk);
}

#if defined(__x86_64__)
#if defined(__clang__)
#define REDIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define REDIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

template <class Body>
__attribute__((target("avx2"))) void run_avx2(const Body& body, int64_t index, const Chunk& chunk) {
  body(index, chunk);
}

template <class Body>
REDIT_AVX512 void run_avx512(const Body& body, int64_t index, const Chunk& chunk) {
  body(index, chunk);
}
#endif

template <class Body>
auto fastest() {
  auto run = &run_baseline<Body>;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) run = &run_avx2<Body>;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    run = &run_avx512<Body>;
#endif
  return run;
}

template <class Body>
void for_each_chunk(const std::vector<Chunk>& chunks, int threads, const Body& body) {
  const auto run = fastest<Body>();
  const int64_t count = int64_t(chunks.size());
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) run(body, i, chunks[i]);
}

template <class W>
constexpr Dtype kDtype = sizeof(W) == 8 ? Dtype::float64 : Dtype::float32;

// Elements as W (float or double): in place where they are W already, else converted into `buffer`.
template <class W>
REDIT_INLINE const W* load(W* __restrict buffer, const Array& from, int64_t first, int64_t n) {
  if (from.dtype == kDtype<W>) return static_cast<const W*>(from.data) + first;
  if (from.dtype == Dtype::float32) {
    const float* __restrict x = static_cast<const float*>(from.data) + first;
    for (int64_t i = 0; i < n; ++i) buffer[i] = W(x[i]);
  } else if (from.dtype == Dtype::float64) {
    const double* __restrict x = static_cast<const double*>(from.data) + first;
    for (int64_t i = 0; i < n; ++i) buffer[i] = W(x[i]);
  } else {
    const uint16_t* __restrict x = static_cast<const uint16_t*>(from.data) + first;
    if (from.dtype == Dtype::bfloat16)
      for (int64_t i = 0; i < n; ++i) buffer[i] = W(from_bfloat16(x[i]));
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = W(from_float16(x[i]));
  }
  return buffer;
}

template <class W>
REDIT_INLINE void store(const Array& to, int64_t first, int64_t n, const W* __restrict x) {
  if (to.dtype == Dtype::float32) {
    float* __restrict out = static_cast<float*>(to.data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = float(x[i]);
  } else if (to.dtype == Dtype::float64) {
    double* __restrict out = static_cast<double*>(to.data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = double(x[i]);
  } else {
    uint16_t* __restrict out = static_cast<uint16_t*>(to.data) + first;
    if (to.dtype == Dtype::bfloat16)
      for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(float(x[i]));
    else
      for (int64_t i = 0; i < n; ++i) out[i] = to_float16(float(x[i]));
  }
}

// out = x rounded to `dtype`.
template <class W>
REDIT_INLINE void round_to(Dtype dtype, W* __restrict out, const W* __restrict x, int64_t n) {
  if (dtype == Dtype::bfloat16)
    for (int64_t i = 0; i < n; ++i) out[i] = W(from_bfloat16(to_bfloat16(float(x[i]))));
  else if (dtype == Dtype::float16)
    for (int64_t i = 0; i < n; ++i) out[i] = W(from_float16(to_float16(float(x[i]))));
  else if (dtype == Dtype::float32)
    for (int64_t i = 0; i < n; ++i) out[i] = W(float(x[i]));
  else
    std::copy(x, x + n, out);
}

REDIT_INLINE double total(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class W>
REDIT_INLINE double sum_of_squares(const Array& tensor, int64_t begin, int64_t end) {
  alignas(64) W buffer[kBlock];
  alignas(64) double lanes[kLanes] = {};
  for (; begin < end; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin), whole = n - n % kLanes;
    const W* x = load(buffer, tensor, begin, n);
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lanes[j] += double(x[i + j]) * double(x[i + j]);
    for (int64_t i = whole; i < n; ++i) lanes[i - whole] += double(x[i]) * double(x[i]);
  }
  return total(lanes);
}

// A block's Philox calls side by side: 129 at most, one for eight weights. Rounds over arrays in the first-level cache
// take 0.4 ns a weight, vectorised; one call after the other takes 0.8.
struct Halves {
  static constexpr int kCalls = kBlock / 8 + 16;  // 129, up to whole vectors
  alignas(64) uint16_t of_weight[8 * kCalls];

  REDIT_INLINE Halves(uint64_t seed, uint32_t step, int64_t first) {
    alignas(64) uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls], words[4 * kCalls];
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t id = uint64_t(first) + uint64_t(i);
      c0[i] = uint32_t(id), c1[i] = uint32_t(id >> 32), c2[i] = kStreamRounding, c3[i] = step;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1)
      for (int i = 0; i < kCalls; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
    for (int i = 0; i < kCalls; ++i)
      words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
    std::memcpy(of_weight, words, sizeof words);  // little-endian: the low half comes first, as the counter says
  }
};

// x float32 -> up with the probability of the bits that the parameter's dtype drops, which are cleared.
REDIT_INLINE void round_stochastically(float* __restrict x, int64_t n, uint32_t dropped, int64_t offset,
                                       const PerturbOptions& options) {
  const Halves halves(options.seed, options.step, offset / 8);
  const uint16_t* __restrict half = halves.of_weight + offset % 8;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]), rounded = (bits + (half[i] & dropped)) & ~dropped;
    x[i] = float_of((bits & 0x7F800000u) == 0x7F800000u ? bits : rounded);
  }
}

template <class W>
REDIT_INLINE void perturb_chunk(double (&sums)[4], const Array& param, const Array& grad, const Chunk& chunk,
                                int64_t offset, const PerturbOptions& options) {
  alignas(64) W x_buffer[kBlock], g_buffer[kBlock], moved[kBlock], intended[kBlock], before[kBlock], after[kBlock];
  alignas(64) double dot[kLanes] = {}, applied[kLanes] = {}, wanted[kLanes] = {}, count[kLanes] = {};
  const bool low = param.dtype == Dtype::bfloat16 || param.dtype == Dtype::float16;
  const Dtype seen = options.compute_dtype < 0 ? param.dtype : Dtype(options.compute_dtype);
  const W scale = W(options.scale);
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - begin), whole = n - n % kLanes;
    const W* x = load(x_buffer, param, begin, n);
    const W* g = load(g_buffer, grad, begin, n);
    if (options.scale == 0)  // where g may hold NaN
      std::fill(intended, intended + n, W(0));
    else
      for (int64_t i = 0; i < n; ++i) intended[i] = scale * g[i];
    for (int64_t i = 0; i < n; ++i) moved[i] = x[i] + intended[i];
    if constexpr (sizeof(W) == 4)
      if (low && options.stochastic)
        round_stochastically(moved, n, param.dtype == Dtype::bfloat16 ? 0xFFFFu : 0x1FFFu, offset + begin, options);
    if (low) {
      round_to(param.dtype, after, moved, n);
      std::copy(after, after + n, moved);
    }
    const W *old = x, *now = moved;
    if (seen != param.dtype) {
      round_to(seen, before, x, n);
      round_to(seen, after, moved, n);
      old = before, now = after;
    }
    const auto add = [&](int64_t i, int j) __attribute__((always_inline)) {
      const double a = double(now[i]) - double(old[i]), b = double(intended[i]);
      dot[j] += a * b;
      applied[j] += a * a;
      wanted[j] += b * b;
      count[j] += a != 0 ? 1.0 : 0.0;
    };
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) add(i + j, j);
    for (int64_t i = whole; i < n; ++i) add(i, int(i - whole));
    store(param, begin, n, static_cast<const W*>(moved));
  }
  sums[0] = total(dot), sums[1] = total(applied), sums[2] = total(wanted), sums[3] = total(count);
}

template <class W>
REDIT_INLINE void adamw_block(W* __restrict w, W* __restrict m, W* __restrict v, const W* __restrict g, int64_t n,
                              const AdamwScalars<W>& scalars) {
  for (int64_t i = 0; i < n; ++i) adamw_element(w[i], m[i], v[i], g[i], scalars);
}

template <class W>
REDIT_INLINE void adamw_chunk(const AdamwTable& table, const AdamwOptions& options, const Chunk& chunk) {
  const int64_t t = chunk.tensor;
  const bool has_master = table.masters[t].data != nullptr;
  W* weights = static_cast<W*>((has_master ? table.masters[t] : table.params[t]).data);
  alignas(64) W buffer[kBlock];
  const AdamwScalars<W> scalars(double(*table.steps[t]) + 1, options.factor, options.lr, options.beta1, options.beta2,
                                options.eps, options.weight_decay);
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - begin);
    if (options.finite)
      adamw_block(weights + begin, static_cast<W*>(table.exp_avgs[t].data) + begin,
                  static_cast<W*>(table.exp_avg_sqs[t].data) + begin, load(buffer, table.grads[t], begin, n), n,
                  scalars);
    if (has_master) store(table.params[t], begin, n, static_cast<const W*>(weights + begin));
  }
}

}  // namespace

double squared_norm(const Arrays& tensors, const Sizes& numels, int threads) {
  const auto chunks = chunks_of(numels);
  std::vector<double> partials(chunks.size());
  for_each_chunk(chunks, threads, [&](int64_t i, const Chunk& chunk) __attribute__((always_inline)) {
    const Array& tensor = tensors[chunk.tensor];
    partials[i] = tensor.dtype == Dtype::float64 ? sum_of_squares<double>(tensor, chunk.begin, chunk.end)
                                                 : sum_of_squares<float>(tensor, chunk.begin, chunk.end);
  });
  double sum = 0;
  for (double partial : partials) sum += partial;
  return sum;
}

void perturb(double* sums, const Arrays& params, const Arrays& grads, const Sizes& numels, const Sizes& offsets,
             const PerturbOptions& options, int threads) {
  struct Partial {
    double sums[4];
  };
  const auto chunks = chunks_of(numels);
  std::vector<Partial> partials(chunks.size());
  for_each_chunk(chunks, threads, [&](int64_t i, const Chunk& chunk) __attribute__((always_inline)) {
    const Array &param = params[chunk.tensor], &grad = grads[chunk.tensor];
    if (param.dtype == Dtype::float64)
      perturb_chunk<double>(partials[i].sums, param, grad, chunk, offsets[chunk.tensor], options);
    else
      perturb_chunk<float>(partials[i].sums, param, grad, chunk, offsets[chunk.tensor], options);
  });
  std::fill(sums, sums + 4, 0.0);
  for (const Partial& partial : partials)
    for (int k = 0; k < 4; ++k) sums[k] += partial.sums[k];
}

void adamw(const AdamwTable& table, const AdamwOptions& options, int threads) {
  for_each_chunk(chunks_of(table.numels), threads, [&](int64_t, const Chunk& chunk) __attribute__((always_inline)) {
    if (table.params[chunk.tensor].dtype == Dtype::float64)
      adamw_chunk<double>(table, options, chunk);
    else
      adamw_chunk<float>(table, options, chunk);
  });
  if (options.finite)
    for (float* step : table.steps) *step += 1;
}

}  // namespace redit
