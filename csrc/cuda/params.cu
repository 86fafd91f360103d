// Passes over parameters; redit_fast/backends/reference/params.py is the definition.
//
//   norm      sum x^2                                             2 / 4 bytes a weight of 16 bits / float32
//   perturb   x += scale g, rounded once; then g *= factor        6 / 12, and 2 / 4 more with a factor
//   combine   g2 = (1 - ratio) g1 + ratio g2                      6 / 12
//   adamw     AdamW of m, v and the master or x; x = master       28 / 28
//
// Compile with -fmad=false: a fused multiply-add would change the bits. 4 blocks a multiprocessor take chunks of one
// tensor by turns; a kernel is for one combination of types. A thread takes 16 bytes at a time of what the pass is
// about: 8 weights of 16 bits, which share a Philox call of the rounding, or 4 of float32 and of AdamW's state, of
// which 8 would make a warp touch halves of sectors. Where one of a tensor's addresses is no multiple of 16 the same
// weights go one by one, and the bits are the same.
//
// Sums: the products of a thread's 4 or 8 weights in float32, by pairs (rounding is at most 4 x 2^-24, 2.4e-7), all
// else in float64; a chunk's over lanes and warps, and then the chunks, in an order that the grid has no part in.
//
// The most of any types:
//
//   kernel   threads  shared bytes  registers: sm_80  sm_90a  sm_100
//   norm         256          4224                44      44      40
//   perturb      256          4608                64      64      64
//   combine      256          4480                64      64      64
//   adamw        256          4096                64      64      60
//   scalars      256             0                33      35      33
//   sum         1024           256                44      48      48

#include <cmath>

#include "cuda/param_chunks.h"

namespace redit {

#include "shared/adamw_element.h"

namespace {

constexpr uint32_t kStreamRounding = 0x10000;

template <Dtype type>
REDIT_DEVICE void norm(const NormLaunch& a) {
  constexpr int kCount = 16 / kBytes<type>;
  using Vector = Packed<type, kCount>;
  __shared__ double warps[2][kWarps][1];
  ChunkSums<1> chunk_sums{warps};
  for_each_chunk(a, [&](const NormTensor& tensor, int chunk, int64_t first, int n) {
    const Weights<type> x(tensor.x, first);
    const bool wide = x.aligned();
    double sums[1] = {};
    for_each_vector<Vector, kCount, 4>(
        n, wide, [&](auto one_by_one, Vector& v, int at, int left) { v.template load<one_by_one>(x, at, left); },
        [&](auto, const Vector& v, int, int) {
          TreeSum squares;
#pragma unroll
          for (int i = 0; i < kCount; i += 2) squares.add(i, v[i], v[i], v[i + 1], v[i + 1]);
          sums[0] += squares.all;
        });
    chunk_sums.write(a, chunk, sums);
  });
}

// The random halves of 8 weights, two in a word: a Philox call's from its half `shift` on, the rest the next call's.
REDIT_DEVICE Words halves_of(const PhiloxKeys& keys, uint32_t step, int64_t call, int shift) {
  const Words own = philox4x32(keys, call, kStreamRounding, step);
  if (shift == 0) return own;
  const Words next = philox4x32(keys, call + 1, kStreamRounding, step);
  uint32_t words[8] = {own.x0, own.x1, own.x2, own.x3, next.x0, next.x1, next.x2, next.x3};
#pragma unroll
  for (int by = 2; by > 0; by /= 2)
#pragma unroll
    for (int i = 0; i + by < 8; ++i) words[i] = shift & 2 * by ? words[i + by] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = shift & 1 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
  return {words[0], words[1], words[2], words[3]};
}

// float32 to a 16-bit type, up with the probability of the bits that it drops: 16 of bfloat16, 13 of float16. NaN stays
// NaN; infinity has no bits that are dropped.
template <Dtype type>
REDIT_DEVICE uint32_t round_stochastically(float x, float next, uint32_t halves) {
  uint32_t low = __float_as_uint(x), high = __float_as_uint(next);
  if constexpr (type == Dtype::bfloat16) {
    low = x == x ? low + (halves & 0xFFFFu) : 0x7FC00000u;
    high = next == next ? high + (halves >> 16) : 0x7FC00000u;
    return low >> 16 | (high & 0xFFFF0000u);
  } else {
    low = x == x ? (low + (halves & 0x1FFFu)) & ~0x1FFFu : low;
    high = next == next ? (high + (halves >> 16 & 0x1FFFu)) & ~0x1FFFu : high;
    return device::pack_float16(__uint_as_float(low), __uint_as_float(high));
  }
}

// A parameter as a forward pass in `seen` has it, another type of 16 bits.
template <Dtype param>
REDIT_DEVICE float as_seen(float x, Dtype seen) {
  if (param == Dtype::float16 || (param == Dtype::float32 && seen == Dtype::bfloat16))
    return __uint_as_float(device::pack_bfloat16(x, 0.0f) << 16);
  return device::float_of_float16(uint16_t(device::pack_float16(x, 0.0f)));
}

struct PerturbChunk {
  const PerturbTensor& tensor;
  int64_t first;
  int n;
  float scale;
  uint32_t step;
};

template <Dtype param, Dtype grad, bool stochastic>
REDIT_DEVICE void perturb_chunk(double (&sums)[4], const PerturbChunk& chunk, const PerturbNumbers& numbers) {
  constexpr int kCount = 16 / kBytes<param>;
  struct Vector {
    Packed<param, kCount> x;
    Packed<grad, kCount> g;
  };
  const Weights<param> x(chunk.tensor.param, chunk.first);
  const Weights<grad> g(chunk.tensor.grad, chunk.first);
  const bool wide = x.aligned() && g.aligned();
  const float scale = chunk.scale;
  const int64_t call = (chunk.tensor.offset + chunk.first) / 8;
  const int n = chunk.n, shift = int(chunk.tensor.offset % 8);
  const bool sees = numbers.seen != param && numbers.seen != Dtype::float32;
  uint32_t minus_moved = 0;
  const auto load = [&](auto one_by_one, Vector& v, int at, int left) {
    v.x.template load<one_by_one>(x, at, left);
    v.g.template load<one_by_one>(g, at, left);
  };
  const auto use = [&](auto one_by_one, Vector& v, int at, int left) {
    Words words{};
    if constexpr (stochastic) words = halves_of(numbers.keys, chunk.step, call + at / 8, shift);
    [[maybe_unused]] const uint32_t halves[4] = {words.x0, words.x1, words.x2, words.x3};
    TreeSum dot, applied, intended;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float change = scale * v.g[i], next_change = scale * v.g[i + 1];
      float before = v.x[i], next_before = v.x[i + 1];
      if constexpr (stochastic)
        v.x.words[i / 2] = round_stochastically<param>(before + change, next_before + next_change, halves[i / 2]);
      else
        v.x.set(i, before + change, next_before + next_change);
      float after = v.x[i], next_after = v.x[i + 1];
      if (sees) {
        before = as_seen<param>(before, numbers.seen), next_before = as_seen<param>(next_before, numbers.seen);
        after = as_seen<param>(after, numbers.seen), next_after = as_seen<param>(next_after, numbers.seen);
      }
      const float move = after - before, next_move = next_after - next_before;
      minus_moved += (move != 0 ? ~0u : 0u) + (next_move != 0 ? ~0u : 0u);  // fewer instructions than + 1
      dot.add(i, move, change, next_move, next_change);
      applied.add(i, move, move, next_move, next_move);
      intended.add(i, change, change, next_change, next_change);
    }
    v.x.template store<one_by_one>(x, at, left);
    if (numbers.scales) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) v.g.set(i, v.g[i] * numbers.factor, v.g[i + 1] * numbers.factor);
      v.g.template store<one_by_one>(g, at, left);
    }
    sums[0] += dot.all, sums[1] += applied.all, sums[2] += intended.all;
  };
  if constexpr (sizeof(Vector) > 32)  // two of 48 bytes would spill registers
    for_each_vector<Vector, kCount, 1>(n, wide, load, use);
  else
    for_each_vector_ahead<Vector, kCount>(n, wide, load, use);
  sums[3] = 0u - minus_moved;
}

template <Dtype param, Dtype grad>
REDIT_DEVICE void perturb(const PerturbLaunch& a) {
  __shared__ double warps[2][kWarps][4];
  ChunkSums<4> chunk_sums{warps};
  const double exact_scale = *a.numbers.scale;
  const float scale = device::to_float(exact_scale);
  const bool still = exact_scale == 0;  // changes nothing, also where a gradient is NaN
  const uint32_t step = uint32_t(*a.numbers.step);
  for_each_chunk(a, [&](const PerturbTensor& tensor, int chunk, int64_t first, int n) {
    double sums[4] = {};
    const PerturbChunk its{tensor, first, still ? 0 : n, scale, step};
    if (param == Dtype::float32 || !a.numbers.stochastic)
      perturb_chunk<param, grad, false>(sums, its, a.numbers);
    else if constexpr (param != Dtype::float32)
      perturb_chunk<param, grad, true>(sums, its, a.numbers);
    chunk_sums.write(a, chunk, sums);
  });
}

template <Dtype type>
REDIT_DEVICE void combine(const CombineLaunch& a) {
  constexpr int kCount = 16 / kBytes<type>;
  struct Vector {
    Packed<type, kCount> first, second;
  };
  __shared__ double warps[2][kWarps][3];
  ChunkSums<3> chunk_sums{warps};
  const float rest = float(1 - a.numbers), share = float(a.numbers);
  for_each_chunk(a, [&](const CombineTensor& tensor, int chunk, int64_t first, int n) {
    const Weights<type> old(tensor.first, first), g(tensor.grad, first);
    const bool wide = old.aligned() && g.aligned();
    double sums[3] = {};
    for_each_vector<Vector, kCount, 2>(
        n, wide,
        [&](auto one_by_one, Vector& v, int at, int left) {
          v.first.template load<one_by_one>(old, at, left);
          v.second.template load<one_by_one>(g, at, left);
        },
        [&](auto one_by_one, Vector& v, int at, int left) {
          TreeSum second, gaps, combined;
#pragma unroll
          for (int i = 0; i < kCount; i += 2) {
            const float g1 = v.first[i], g2 = v.second[i], next_g1 = v.first[i + 1], next_g2 = v.second[i + 1];
            v.second.set(i, rest * g1 + share * g2, rest * next_g1 + share * next_g2);
            second.add(i, g2, g2, next_g2, next_g2);
            gaps.add(i, g2 - g1, g2 - g1, next_g2 - next_g1, next_g2 - next_g1);
            combined.add(i, v.second[i], v.second[i], v.second[i + 1], v.second[i + 1]);
          }
          v.second.template store<one_by_one>(g, at, left);
          sums[0] += second.all, sums[1] += gaps.all, sums[2] += combined.all;
        });
    chunk_sums.write(a, chunk, sums);
  });
}

struct SquareRoot {
  REDIT_DEVICE float operator()(float x) const { return std::sqrt(x); }
};

template <Dtype param, Dtype grad>
REDIT_DEVICE void adamw(const AdamwLaunch& a) {
  constexpr int kCount = 4;
  using State = Packed<Dtype::float32, kCount>;
  struct Vector {
    State w, m, v;
    Packed<grad, kCount> g;
  };
  const bool finite = *a.numbers;
  for_each_chunk(a, [&](const AdamwTensor& tensor, int, int64_t first, int n) {
    const Weights<param> x(tensor.param, first);
    const Weights<Dtype::float32> w(tensor.master ? tensor.master : tensor.param, first), m(tensor.exp_avg, first),
        v(tensor.exp_avg_sq, first);
    const Weights<grad> g(tensor.grad, first);
    const bool wide = x.aligned() && w.aligned() && m.aligned() && v.aligned() && g.aligned();
    const AdamwScalars<float> scalars = *tensor.scalars;
    for_each_vector<Vector, kCount, 1>(
        n, wide,
        [&](auto one_by_one, Vector& its, int at, int left) {
          its.w.template load<one_by_one>(w, at, left);
          if (!finite) return;
          its.m.template load<one_by_one>(m, at, left);
          its.v.template load<one_by_one>(v, at, left);
          its.g.template load<one_by_one>(g, at, left);
        },
        [&](auto one_by_one, Vector& its, int at, int left) {
          if (finite) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              float weight = its.w[i], mean = its.m[i], square = its.v[i];
              adamw_element(weight, mean, square, its.g[i], scalars, SquareRoot{});
              its.w.words[i] = __float_as_uint(weight);
              its.m.words[i] = __float_as_uint(mean), its.v.words[i] = __float_as_uint(square);
            }
            its.w.template store<one_by_one>(w, at, left);
            its.m.template store<one_by_one>(m, at, left);
            its.v.template store<one_by_one>(v, at, left);
          }
          if (!tensor.master) return;
          Packed<param, kCount> copy;
#pragma unroll
          for (int i = 0; i < kCount; i += 2) copy.set(i, its.w[i], its.w[i + 1]);
          copy.template store<one_by_one>(x, at, left);
        });
  });
}

// To a whole exponent of at least 0, by squaring: a few float64 ulps from the rounded power.
REDIT_DEVICE double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 == 1) result *= base;
  return result;
}

}  // namespace

#define REDIT_PARAMS(pass, Launch, name, ...)                                 \
  extern "C" __global__ void __launch_bounds__(kParamsThreads, kParamsBlocks) \
      params_##pass##_##name(const __grid_constant__ Launch a) {              \
    pass<__VA_ARGS__>(a);                                                     \
  }
#define REDIT_PARAMS_OF(type)                                                         \
  REDIT_PARAMS(norm, NormLaunch, type, Dtype::type)                                   \
  REDIT_PARAMS(combine, CombineLaunch, type, Dtype::type)                             \
  REDIT_PARAMS(perturb, PerturbLaunch, type##_float32, Dtype::type, Dtype::float32)   \
  REDIT_PARAMS(perturb, PerturbLaunch, type##_bfloat16, Dtype::type, Dtype::bfloat16) \
  REDIT_PARAMS(perturb, PerturbLaunch, type##_float16, Dtype::type, Dtype::float16)   \
  REDIT_PARAMS(adamw, AdamwLaunch, type##_float32, Dtype::type, Dtype::float32)       \
  REDIT_PARAMS(adamw, AdamwLaunch, type##_bfloat16, Dtype::type, Dtype::bfloat16)     \
  REDIT_PARAMS(adamw, AdamwLaunch, type##_float16, Dtype::type, Dtype::float16)
REDIT_PARAMS_OF(float32)
REDIT_PARAMS_OF(bfloat16)
REDIT_PARAMS_OF(float16)

// A launch before the weights', whose chunks all read a tensor's numbers.
extern "C" __global__ void __launch_bounds__(kParamsThreads, 1)
    params_scalars(const __grid_constant__ ScalarsLaunch a) {
  const int tensor = int(blockIdx.x * kParamsThreads + threadIdx.x);
  if (tensor >= a.count) return;
  const float step = *a.steps[tensor] + 1.0f;
  const double power1 = power(a.options.beta1, int64_t(step)), power2 = power(a.options.beta2, int64_t(step));
  a.scalars[tensor] = AdamwScalars<float>(a.options, power1, power2, *a.factor);
  if (*a.finite) *a.steps[tensor] = step;
}

// out[k] = the sum of row k of the partial sums.
extern "C" __global__ void __launch_bounds__(kSumThreads, 1) params_sum(const __grid_constant__ SumLaunch a) {
  __shared__ double warps[kSumThreads / 32][1];
  double own[1] = {};
  for (int64_t i = threadIdx.x; i < a.stride; i += kSumThreads) own[0] += a.partials[blockIdx.x * a.stride + i];
  const double total = block_sum(own, warps);
  if (threadIdx.x == 0) a.out[blockIdx.x] = total;
}

#define REDIT_PARAMS_KERNELS(type)                                                                   \
  REDIT_KERNEL(params_norm_##type), REDIT_KERNEL(params_combine_##type),                             \
      REDIT_KERNEL(params_perturb_##type##_float32), REDIT_KERNEL(params_perturb_##type##_bfloat16), \
      REDIT_KERNEL(params_perturb_##type##_float16), REDIT_KERNEL(params_adamw_##type##_float32),    \
      REDIT_KERNEL(params_adamw_##type##_bfloat16), REDIT_KERNEL(params_adamw_##type##_float16)

cuda::Kernels cuda::params_kernels() {
  return {REDIT_PARAMS_KERNELS(float32), REDIT_PARAMS_KERNELS(bfloat16), REDIT_PARAMS_KERNELS(float16),
          REDIT_KERNEL(params_scalars), REDIT_KERNEL(params_sum)};
}

}  // namespace redit
