// What the kernels of params.cu share: weights as they lie in memory, the walk over a launch's chunks, and sums whose
// order the grid has no part in.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/params.h"

namespace redit {

constexpr int kWarps = kParamsThreads / 32;

template <Dtype type>
constexpr int kBytes = type == Dtype::float32 ? 4 : 2;

// Numbers of one tensor, from its element `first` on.
template <Dtype type>
struct Weights {
  using Stored = std::conditional_t<type == Dtype::float32, uint32_t, uint16_t>;
  Stored* data;

  REDIT_DEVICE Weights(const void* tensor, int64_t first)
      : data(static_cast<Stored*>(const_cast<void*>(tensor)) + first) {
    __builtin_assume(__isGlobal(data));
  }
  REDIT_DEVICE bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// Some of them as a thread has them: a multiple of 8 bytes.
template <Dtype type, int count>
struct Packed {
  static constexpr int kWords = count * kBytes<type> / 4, kInWord = 4 / kBytes<type>;
  uint32_t words[kWords];

  REDIT_DEVICE float operator[](int i) const {
    const uint32_t word = words[i / kInWord];
    if constexpr (type == Dtype::float32) return __uint_as_float(word);
    if constexpr (type == Dtype::bfloat16) return __uint_as_float(i % 2 ? word & 0xFFFF0000u : word << 16);
    return device::float_of_float16(uint16_t(i % 2 ? word >> 16 : word));
  }
  // i is even; to nearest.
  REDIT_DEVICE void set(int i, float x, float next) {
    if constexpr (type == Dtype::float32) words[i] = __float_as_uint(x), words[i + 1] = __float_as_uint(next);
    if constexpr (type == Dtype::bfloat16) words[i / 2] = device::pack_bfloat16(x, next);
    if constexpr (type == Dtype::float16) words[i / 2] = device::pack_float16(x, next);
  }

  // Those from `at` on, of `left` that there are: the rest are zeros. `wide`: all of the tensor's addresses are
  // multiples of 16.
  REDIT_DEVICE void load(Weights<type> from, int at, int left, bool wide) {
    const auto* p = from.data + at;
    if (wide && left >= count) {
      if constexpr (kWords == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(p);
        words[0] = two.x, words[1] = two.y;
      }
#pragma unroll
      for (int w = 0; w + 4 <= kWords; w += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(p)[w / 4];
        words[w] = four.x, words[w + 1] = four.y, words[w + 2] = four.z, words[w + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const uint32_t bits = i < left ? p[i] : 0;
        words[i / kInWord] = i % kInWord ? words[i / kInWord] | bits << 16 : bits;
      }
    }
  }
  REDIT_DEVICE void store(Weights<type> to, int at, int left, bool wide) const {
    auto* p = to.data + at;
    if (wide && left >= count) {
      if constexpr (kWords == 2) *reinterpret_cast<uint2*>(p) = {words[0], words[1]};
#pragma unroll
      for (int w = 0; w + 4 <= kWords; w += 4)
        reinterpret_cast<uint4*>(p)[w / 4] = {words[w], words[w + 1], words[w + 2], words[w + 3]};
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (i < left) p[i] = typename Weights<type>::Stored(words[i / kInWord] >> i % kInWord * 16);
    }
  }
};

// body(tensor, chunk, first, n) for each of the block's chunks: n weights from `first` on.
template <class Launch, class Body>
REDIT_DEVICE void for_each_chunk(const Launch& a, const Body& body) {
  int64_t tensor = 0;
  for (int64_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x) {
    while (tensor + 1 < a.count && a.tensors[tensor + 1].first_chunk <= chunk) ++tensor;
    const typename Launch::Listed& its = a.tensors[tensor];
    const int64_t first = (chunk - its.first_chunk) * kWeights, left = its.numel - first;
    body(its, chunk, first, int(left < kWeights ? left : kWeights));
  }
}

// The thread's vectors of a chunk: load(vector, at) of `turns` before use(vector, at), so that their bytes are under
// way together.
template <class Vector, int count, int turns, class Load, class Use>
REDIT_DEVICE void for_each_vector(int n, const Load& load, const Use& use) {
  constexpr int kStep = count * kParamsThreads;
  static_assert(kWeights % (turns * kStep) == 0);
  for (int at = count * int(threadIdx.x); at < n; at += turns * kStep) {
    Vector vectors[turns];
#pragma unroll
    for (int k = 0; k < turns; ++k)
      if (at + k * kStep < n) load(vectors[k], at + k * kStep);
#pragma unroll
    for (int k = 0; k < turns; ++k)
      if (at + k * kStep < n) use(vectors[k], at + k * kStep);
  }
}

// Sums of a few products of neighbours, of which each pair is added first.
template <int pairs>
struct PairSums {
  float parts[pairs];

  REDIT_DEVICE void set(int pair, float x, float y, float next_x, float next_y) {
    parts[pair] = x * y + next_x * next_y;
  }
  REDIT_DEVICE double total() const {
    if constexpr (pairs == 2) return parts[0] + parts[1];
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
};

// Thread k gets sum k of all threads: lanes by exclusive or, then warps in order. `warps` may be written again after
// another barrier.
template <int sums, int count>
REDIT_DEVICE double block_sum(double (&own)[sums], double (&warps)[count][sums]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    for (int k = 0; k < sums; ++k) own[k] += __shfl_xor_sync(0xFFFFFFFFu, own[k], lane);
  const int t = int(threadIdx.x);
  if (t % 32 == 0)
    for (int k = 0; k < sums; ++k) warps[t / 32][k] = own[k];
  __syncthreads();
  double total = 0;
  if (t < sums)
    for (int w = 0; w < count; ++w) total += warps[w][t];
  return total;
}

// The sums of one chunk after the other, in two rooms by turns: one barrier a chunk.
template <int sums>
struct ChunkSums {
  double (&warps)[2][kWarps][sums];
  int turn = 0;

  template <class Launch>
  REDIT_DEVICE void write(const Launch& a, int64_t chunk, double (&own)[sums]) {
    const double total = block_sum(own, warps[turn]);
    if (threadIdx.x < sums) a.partials[int64_t(threadIdx.x) * a.stride + chunk] = total;
    turn ^= 1;
  }
};

}  // namespace redit
