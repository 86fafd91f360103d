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
      : data(static_cast<Stored*>(const_cast<void*>(tensor)) + first) {}
  REDIT_DEVICE bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// 16 bytes of the thread's own, by which its weights go one by one: where a loop finds them it needs few registers.
REDIT_DEVICE uint32_t* own_slot() {
  __shared__ uint4 slots[kParamsThreads];
  return &slots[threadIdx.x].x;
}

// Some of them as a thread has them: 8 bytes or a multiple of 16.
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

  // Those from `at` on: as they lie there, or `one_by_one` those of which there are `left`, the others zeros.
  template <bool one_by_one>
  REDIT_DEVICE void load(Weights<type> from, int at, int left) {
    const auto* p = from.data + at;
#pragma unroll
    for (int part = 0; part < count; part += kInSlot) {
      if constexpr (!one_by_one) {
        take(part, __ldcs(reinterpret_cast<const Slot*>(p + part)));
      } else {
        uint32_t* slot = own_slot();
#pragma unroll 2
        for (int i = 0; i < kInSlot; i += kInWord) {
          uint32_t word = part + i < left ? __ldcs(p + part + i) : 0;
          if (kInWord == 2 && part + i + 1 < left) word |= uint32_t(__ldcs(p + part + i + 1)) << 16;
          slot[i / kInWord] = word;
        }
        take(part, *reinterpret_cast<const Slot*>(slot));
      }
    }
  }
  template <bool one_by_one>
  REDIT_DEVICE void store(Weights<type> to, int at, int left) const {
    auto* p = to.data + at;
#pragma unroll
    for (int part = 0; part < count; part += kInSlot) {
      if constexpr (!one_by_one) {
        __stcs(reinterpret_cast<Slot*>(p + part), slot_of(part));
      } else {
        uint32_t* slot = own_slot();
        *reinterpret_cast<Slot*>(slot) = slot_of(part);
#pragma unroll 2
        for (int i = 0; i < kInSlot; i += kInWord) {
          const uint32_t word = slot[i / kInWord];
          if (part + i < left) __stcs(p + part + i, typename Weights<type>::Stored(word));
          if (kInWord == 2 && part + i + 1 < left) __stcs(p + part + i + 1, typename Weights<type>::Stored(word >> 16));
        }
      }
    }
  }

 private:
  static constexpr int kInSlot = kWords == 2 ? count : 16 / kBytes<type>;
  using Slot = std::conditional_t<kWords == 2, uint2, uint4>;

  REDIT_DEVICE void take(int, uint2 two) { words[0] = two.x, words[1] = two.y; }
  REDIT_DEVICE void take(int part, uint4 four) {
    const int w = part / kInWord;
    words[w] = four.x, words[w + 1] = four.y, words[w + 2] = four.z, words[w + 3] = four.w;
  }
  REDIT_DEVICE Slot slot_of(int part) const {
    const int w = part / kInWord;
    if constexpr (kWords == 2)
      return make_uint2(words[w], words[w + 1]);
    else
      return make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
  }
};

// body(tensor, chunk, first, n) for each of the block's chunks: n weights from `first` on.
template <class Launch, class Body>
REDIT_DEVICE void for_each_chunk(const Launch& a, const Body& body) {
  int tensor = 0;
  for (int chunk = int(blockIdx.x); chunk < a.chunks; chunk += int(gridDim.x)) {
    while (tensor + 1 < a.count && a.tensors[tensor + 1].first_chunk <= chunk) ++tensor;
    const typename Launch::Listed& its = a.tensors[tensor];
    const int64_t first = int64_t(chunk - its.first_chunk) * kWeights, left = its.numel - first;
    body(its, chunk, first, int(left < kWeights ? left : kWeights));
  }
}

// The thread's vectors of a chunk of n weights: load(one_by_one, vector, at, left) and use(one_by_one, vector, at,
// left). One by one go the chunk's last weights, and where an address is no multiple of 16, so not `wide`, all: the
// same vectors, so that the bits are the same.
constexpr std::false_type kWhole{};
constexpr std::true_type kOneByOne{};

template <class Vector, int count, class Load, class Use>
REDIT_DEVICE void for_the_rest(int n, int end, const Load& load, const Use& use) {
  constexpr int kStep = count * kParamsThreads;
#pragma unroll 1
  for (int at = end + ((count * int(threadIdx.x) - end) & (kStep - 1)); at < n; at += kStep) {
    Vector vector;
    load(kOneByOne, vector, at, n - at);
    use(kOneByOne, vector, at, n - at);
  }
}

// `turns` vectors are loaded before one is used, so that their bytes are under way together.
template <class Vector, int count, int turns, class Load, class Use>
REDIT_DEVICE void for_each_vector(int n, bool wide, const Load& load, const Use& use) {
  constexpr int kStep = count * kParamsThreads;
  const int end = wide ? n / count * count : 0;
#pragma unroll 1
  for (int at = count * int(threadIdx.x); at < end; at += turns * kStep) {
    Vector vectors[turns];
#pragma unroll
    for (int k = 0; k < turns; ++k)
      if (at + k * kStep < end) load(kWhole, vectors[k], at + k * kStep, count);
#pragma unroll
    for (int k = 0; k < turns; ++k)
      if (at + k * kStep < end) use(kWhole, vectors[k], at + k * kStep, count);
  }
  for_the_rest<Vector, count>(n, end, load, use);
}

// The next vector is under way while one is used: one use in the code, of which two would need more registers than
// there are.
template <class Vector, int count, class Load, class Use>
REDIT_DEVICE void for_each_vector_ahead(int n, bool wide, const Load& load, const Use& use) {
  constexpr int kStep = count * kParamsThreads;
  const int end = wide ? n / count * count : 0;
  int at = count * int(threadIdx.x);
  if (at < end) {
    Vector vector;
    load(kWhole, vector, at, count);
#pragma unroll 1
    for (; at < end; at += kStep) {
      Vector next{};
      if (at + kStep < end) load(kWhole, next, at + kStep, count);
      use(kWhole, vector, at, count);
      vector = next;
    }
  }
  for_the_rest<Vector, count>(n, end, load, use);
}

// The sum of a few products of neighbours: of pairs, of fours, of all.
struct TreeSum {
  float pair, four, all;

  REDIT_DEVICE void add(int i, float x, float y, float next_x, float next_y) {  // i: 0, 2, 4, ..., ascending
    const float sum = x * y + next_x * next_y;
    pair = i % 4 == 0 ? sum : pair + sum;
    if (i % 8 == 2) four = all = pair;
    if (i % 8 == 6) all = four + pair;
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
  REDIT_DEVICE void write(const Launch& a, int chunk, double (&own)[sums]) {
    const double total = block_sum(own, warps[turn]);
    if (threadIdx.x < sums) a.partials[int64_t(threadIdx.x) * a.stride + chunk] = total;
    turn ^= 1;
  }
};

}  // namespace redit
