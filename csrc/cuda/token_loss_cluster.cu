// Token log-probs and losses from logits, each logit read once and its gradient written once, whatever the L2 cache
// does: 2 + 2 bytes of 16 bits. With the bits of token_loss.cu's kernels, which need two readings.
//
// A cluster has a row, a block a slice of it, in one of three buffers of shared memory: a bulk copy loads the next row
// while this one is computed and the gradient of the one before leaves by a bulk copy. e stays in float32 registers, of
// at most 4, 6, 8 or 10 vectors a thread (the last number of a kernel's name): one exponential and 9.5 instructions an
// element of 16 bits. What does not count, the target and what is beyond the row, is -inf in the buffer, so that no
// element is compared with anything; under softcap, where that is no -inf of z, a vector is.
//
// A slice comes with its address's remainder mod 16: whole granules by the bulk copy, the first and last by elements.
// Where that is not 0 the slice slides to the begin of its buffer before the sums and back after the gradient, 4.4 more
// instructions an element, so that the order of the sums is the row's own.
//
//   kernel            threads  shared bytes            registers: sm_80  sm_90a  sm_100
//   cluster_128x10        128  416 + 48 vectors a slice              -     135     168
//   cluster_512x4         512  416 + 48 vectors a slice              -      90     110
//   cluster_512x6         512  416 + 48 vectors a slice              -     103     118
//   cluster_512x8         512  416 + 48 vectors a slice              -     118     117
//   cluster_512x10        512  416 + 48 vectors a slice              -     128     128
//   cluster_128_logp      128  416 + 48 vectors a slice              -      64      67
//   cluster_512_logp      512  416 + 48 vectors a slice              -      63      67

#include "cuda/token_rows.h"

namespace redit {

#if REDIT_CLUSTERS_ARE_THERE

namespace {

struct ClusterShared {
  uint64_t full[kStages];
  int targets[kStages];  // of row n in place n % kStages: one is known two rows ahead
  RowBegin begins[2];
  RowEnd end;
  WarpSums warps;
  float peers[2][2][kMostPeers];  // by turn: what each block of the cluster found
};
static_assert(sizeof(ClusterShared) <= kClusterHeader && kClusterHeader % 16 == 0);

// Where a row's slice lies in a buffer, in bytes from it, and what of it bulk copies move, in granules.
struct Place {
  char* base;      // in global memory, of the buffer's first byte
  int begin, end;  // the slice's own bytes
  int load_from, load_to, store_from, store_to;

  REDIT_DEVICE Place(const void* row, int from, int count, int row_bytes) {
    const int shift = int(reinterpret_cast<uintptr_t>(row) % 16), rest = row_bytes - 16 * from;
    base = static_cast<char*>(const_cast<void*>(row)) + (16 * from - shift);
    begin = shift;
    end = shift + (rest < 16 * count ? rest : 16 * count);
    load_from = shift && from == 0 ? 1 : 0,
    store_from = shift ? 1 : 0;  // what is before it is not the row's, or not its own
    const int granules = (end + 15) / 16, whole = (rest + shift) / 16;
    load_to = whole < granules ? whole : granules, store_to = end / 16;
  }
  // The byte of the element that thread t moves itself; -1: none.
  template <int kWide>
  REDIT_DEVICE int edge(int t, int from, int to) const {
    const int last = to > from ? to : from;
    const int at = t < kWide ? (from ? t * (16 / kWide) : end) : 16 * last + (t - kWide) * (16 / kWide);
    return t < 2 * kWide && at >= begin && at < end && (t >= kWide || at < 16) ? at : -1;
  }
};

// Moves what begins `shift` bytes into a buffer to its begin, or back: `count` vectors, of which thread t has t,
// t + threads, ... from then on; back, one granule more, the last first. All granules of a turn are read before one is
// written, and no later turn reads those.
template <class Type, bool back, int threads, int words>
REDIT_DEVICE void slide_words(Vector* granules, int count, uint32_t shift) {
#pragma unroll 1
  for (int i = int(threadIdx.x), first = 0; first < count + back; i += threads, first += threads) {
    const int v = back ? max(count - i, 0) : min(i, count - 1);  // the last threads read what nobody writes
    const Vector x = back ? joined<Type, words>(granules[max(v - 1, 0)], granules[v], shift)
                          : joined<Type, words>(granules[v], granules[v + 1], shift);
    __syncthreads();
    if (i < count + back) granules[v] = x;
  }
}
template <class Type, bool back, int threads>
REDIT_DEVICE void slide(Vector* granules, int count, int shift) {
  const uint32_t by = back ? 16 - shift : shift;
  if (by < 4) return slide_words<Type, back, threads, 0>(granules, count, by);
  if (by < 8) return slide_words<Type, back, threads, 1>(granules, count, by);
  if (by < 12) return slide_words<Type, back, threads, 2>(granules, count, by);
  slide_words<Type, back, threads, 3>(granules, count, by);
}

template <class Type, bool capped, int kThreads, int kVectors, class Launch>
REDIT_DEVICE void cluster_rows(const Launch& a) {
  using Stored = typename Type::Stored;
  constexpr bool kStore = std::is_same_v<Launch, TokenLossLaunch>;
  constexpr int kWide = Type::kWide, kWarps = kThreads / 32;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<ClusterShared*>(memory);
  const Matrix& logits = a.op.logits.matrix;
  const int vocabulary = int(logits.columns), vectors = (vocabulary + kWide - 1) / kWide;
  const int t = int(threadIdx.x), peers = a.slices.count;

  const auto buffer_of = [&](uint32_t n) {
    return memory + kClusterHeader + n % kStages * (16 * (a.slices.vectors + 1));
  };
  // e leaves 48 registers for all else. So the rank, the cluster's n-th row and, in places, the thread are asked for
  // where they are needed, and what follows from them is kept nowhere.
  const auto nth = [](uint32_t n) { return device::cluster_index() + int64_t(n) * device::cluster_count(); };
  const auto from = [&] { return device::cluster_rank() * a.slices.vectors; };  // the slice's first vector
  const auto count = [&] {                                                      // and how many it has
    const int rest = vectors - from();
    return rest < a.slices.vectors ? rest : a.slices.vectors;
  };
  const auto place = [&](const Matrix& matrix, uint32_t n) {
    return Place(row_of<Stored>(matrix, nth(n)), from(), count(), vocabulary * int(sizeof(Stored)));
  };
  const auto masked = [&](uint32_t n) { return shared.targets[n % kStages] == kMasked; };
  const auto ask_target = [&](uint32_t n) {  // by one thread
    const int64_t row = nth(n);
    shared.targets[n % kStages] = row < logits.rows ? column_of(a.op.logits.targets[row], vocabulary) : kMasked;
  };
  const auto fetch = [&](uint32_t n) {  // by one thread
    const Place p = place(logits, n);
    const uint32_t bytes = !masked(n) && p.load_to > p.load_from ? uint32_t(p.load_to - p.load_from) * 16 : 0;
    uint64_t* full = &shared.full[n % kStages];
    device::mbarrier_expect(full, bytes);
    if (bytes) device::bulk_load(buffer_of(n) + 16 * p.load_from, p.base + 16 * p.load_from, bytes, full);
  };
  // What row n begins with, the elements at its slice's edges, and the target of the row after: by the second warp,
  // while the first finishes the row before.
  const auto prepare = [&](uint32_t n) {
    const int64_t row = nth(n);
    if (row >= logits.rows) return;
    const int lane = device::thread() % 32, target = shared.targets[n % kStages];
    if (lane == 31) ask_target(n + 1);
    if (target == kMasked) return;
    RowBegin& begin = shared.begins[n % 2];
    const Place p = place(logits, n);
    const int at = p.template edge<kWide>(lane, p.load_from, p.load_to);
    if (at >= 0)
      *reinterpret_cast<Stored*>(buffer_of(n) + at) = *reinterpret_cast<const Stored*>(p.base + at);
    else if (lane >= 16 && lane < 22)
      begin.numbers[lane - 16] = row_number(a, row, lane - 16);
    else if (lane == 22)
      begin.at_target = target >= 0 ? Type::widen(row_of<const Stored>(logits, row)[target]) : kNaN;
  };

  if (t == 0) {
    for (int i = 0; i < kStages; ++i) device::mbarrier_init(&shared.full[i], 1);
    device::fence_mbarrier_init();
    ask_target(0);
  }
  device::sync_cluster();  // the mbarriers are there, and so are the peers
  if (t == 0) fetch(0);
  if (t / 32 == 1) prepare(0);
  __syncthreads();

  int turn = 0;
  for (uint32_t n = 0; nth(n) < logits.rows; ++n) {
    if (t == 0 && nth(n + 1) < logits.rows) {
      if (kStore) device::bulk_wait_read<kStages - 2>();
      fetch(n + 1);
    }
    unsigned char* buffer = buffer_of(n);
    auto* granules = reinterpret_cast<Vector*>(buffer);
    device::mbarrier_wait(&shared.full[n % kStages], n / kStages & 1);
    __syncthreads();  // the edges and the target too are there, and the next row's buffer is free

    const RowBegin& now = shared.begins[n % 2];
    // From the slice's first element:
    const int target = shared.targets[n % kStages] - from() * kWide, row_end = vocabulary - from() * kWide;
    const int mine = count() - t;  // thread t has the vectors t, t + kThreads, ... below count
    if (!masked(n)) {
      if (const int shift = place(logits, n).begin) slide<Type, false, kThreads>(granules, count(), shift);
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {  // in the two vectors that may have any, by their owners
        const int v = (i ? target : row_end) >> Type::kLog;
        if (v >= 0 && v < count() && v % kThreads == t) granules[v] = counted<Type>(granules[v], v, target, row_end);
      }
    }
    RowEnd end;
    float anchor = now.at_target, e[kVectors ? kVectors : 1][kWide];
    for (bool repaired = false;; repaired = true) {
      if (!masked(n)) {
        turn ^= 1;
        const Gap<capped> gap(anchor, a.transform);
        RowSums sums{};
        if constexpr (kStore) {
#pragma unroll
          for (int k = 0; k < kVectors; ++k) {
            if (k * kThreads >= mine) break;
            const int v = k * kThreads + t;
            add<Type, capped>(sums, e[k], granules[v], v, target, row_end, gap);
          }
        } else {
#pragma unroll 2
          for (int v = t; v < t + mine; v += kThreads)
            add<Type, capped>(sums, e[0], granules[v], v, target, row_end, gap);
        }
        sums = warp_sum(sums);
        shared.warps.put(sums.others, sums.weighted);
        __syncthreads();
        if (t < 32) {
          const float total = shared.warps.total(kWarps);
          const int lane = device::thread();
          if (lane % 16 < peers)
            device::store_peer(&shared.peers[turn][lane / 16][device::cluster_rank()], lane % 16, total);
        }
        device::sync_cluster();
      }
      if (t < 32) {
        const bool writes = device::thread() == 0 && device::cluster_rank() == 0;
        RowEnd found{0, 0, 0, false, true};
        if (masked(n)) {
          if (writes) finish_masked(a, nth(n));
        } else {
          double others = 0, weighted = 0;
#pragma unroll 1
          for (int r = 0; r < peers; ++r) others += shared.peers[turn][0][r], weighted += shared.peers[turn][1][r];
          const RowSums all{float(others), float(weighted)};
          found = finish_or_repair(a, nth(n), repaired, anchor, now.at_target, all, now.numbers, writes);
        }
        if (t == 0) shared.end = found;
      } else if (t < 64 && !repaired) {
        prepare(n + 1);
      }
      __syncthreads();
      end = shared.end;
      if (!end.again) break;
      turn ^= 1;
      float top = now.at_target;
#pragma unroll 1
      for (int v = device::thread(); v < count(); v += kThreads) top = largest<Type>(top, granules[v]);
      shared.warps.put(warp_largest(top), 0);
      __syncthreads();
      if (t < 32) {
        top = shared.warps.largest(kWarps);
        if (t < peers) device::store_peer(&shared.peers[turn][0][device::cluster_rank()], t, top);
      }
      device::sync_cluster();
      anchor = shared.peers[turn][0][0];
#pragma unroll 1
      for (int r = 1; r < peers; ++r) anchor = shared.peers[turn][0][r] > anchor ? shared.peers[turn][0][r] : anchor;
    }
    if constexpr (kStore) {
      if (end.zero) {
#pragma unroll 1
        for (int v = device::thread(); v <= count(); v += kThreads) granules[v] = Vector{};
      } else {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          if (k * kThreads >= mine) break;
          float g[kWide];
#pragma unroll
          for (int i = 0; i < kWide; ++i) g[i] = e[k][i] * end.constant;
          granules[k * kThreads + t] = packed<Type>(g);
        }
        const int at = shared.targets[n % kStages] - from() * kWide;
        if (at >= 0 && at < count() * kWide && at / kWide % kThreads == t)  // who has its vector
          reinterpret_cast<Stored*>(buffer)[at] = Type::narrow(end.at_target);
        if (const int shift = place(logits, n).begin) {
          __syncthreads();
          slide<Type, true, kThreads>(granules, count(), shift);
        }
      }
      device::fence_async();
      __syncthreads();
      const Place out = place(a.op.grad, n);  // of the row's alignment: the plan sees to it
      const int at = out.template edge<kWide>(device::thread(), out.store_from, out.store_to);
      if (at >= 0) *reinterpret_cast<Stored*>(out.base + at) = *reinterpret_cast<const Stored*>(buffer + at);
      if (t == 0) {
        if (out.store_to > out.store_from)
          device::bulk_store(out.base + 16 * out.store_from, buffer + 16 * out.store_from,
                             uint32_t(out.store_to - out.store_from) * 16);
        device::bulk_commit();
      }
    } else {
      device::fence_async();  // the edges were written before a bulk copy writes here
    }
  }
  if (kStore && t == 0) device::bulk_wait<0>();
  device::sync_cluster();  // no peer writes any more into this block's memory
}

}  // namespace

#define REDIT_BOUNDS(threads) __launch_bounds__(threads, threads == kFewThreads ? 3 : 1)
#define REDIT_ROWS(...) cluster_rows<__VA_ARGS__>(a)
#else
#define REDIT_BOUNDS(threads) __launch_bounds__(32)
#define REDIT_ROWS(...)
#endif

#define REDIT_CLUSTER(type, Type, capped, threads, vectors)                                          \
  extern "C" __global__ void REDIT_BOUNDS(threads)                                                   \
      token_loss_cluster_##threads##x##vectors##_##type(const __grid_constant__ TokenLossLaunch a) { \
    REDIT_ROWS(Type, capped, threads, vectors);                                                      \
  }
#define REDIT_CLUSTER_LOGP(type, Type, capped, threads)                                       \
  extern "C" __global__ void REDIT_BOUNDS(threads)                                            \
      token_loss_cluster_##threads##_logp_##type(const __grid_constant__ TokenLogpLaunch a) { \
    REDIT_ROWS(Type, capped, threads, 0);                                                     \
  }
#define REDIT_CLUSTERS(type, Type, capped)    \
  REDIT_CLUSTER(type, Type, capped, 128, 10)  \
  REDIT_CLUSTER(type, Type, capped, 512, 4)   \
  REDIT_CLUSTER(type, Type, capped, 512, 6)   \
  REDIT_CLUSTER(type, Type, capped, 512, 8)   \
  REDIT_CLUSTER(type, Type, capped, 512, 10)  \
  REDIT_CLUSTER_LOGP(type, Type, capped, 128) \
  REDIT_CLUSTER_LOGP(type, Type, capped, 512)
REDIT_CLUSTERS(float32, Float32, false)
REDIT_CLUSTERS(float32_capped, Float32, true)
REDIT_CLUSTERS(bfloat16, BFloat16, false)
REDIT_CLUSTERS(bfloat16_capped, BFloat16, true)
REDIT_CLUSTERS(float16, Float16, false)
REDIT_CLUSTERS(float16_capped, Float16, true)

#define REDIT_CLUSTERS_LIST(type)                                                                       \
  REDIT_KERNEL(token_loss_cluster_128x10_##type), REDIT_KERNEL(token_loss_cluster_512x4_##type),        \
      REDIT_KERNEL(token_loss_cluster_512x6_##type), REDIT_KERNEL(token_loss_cluster_512x8_##type),     \
      REDIT_KERNEL(token_loss_cluster_512x10_##type), REDIT_KERNEL(token_loss_cluster_128_logp_##type), \
      REDIT_KERNEL(token_loss_cluster_512_logp_##type)
cuda::Kernels cuda::token_loss_cluster_kernels() {
  return {REDIT_CLUSTERS_LIST(float32),  REDIT_CLUSTERS_LIST(float32_capped),
          REDIT_CLUSTERS_LIST(bfloat16), REDIT_CLUSTERS_LIST(bfloat16_capped),
          REDIT_CLUSTERS_LIST(float16),  REDIT_CLUSTERS_LIST(float16_capped)};
}

}  // namespace redit
