// Token log-probs and losses from logits, each logit read once and its gradient written once, whatever the L2 cache
// does: 2 + 2 bytes of 16 bits. With the bits of token_loss.cu's kernels, which need two readings.
//
// A cluster has a row, a block a slice of it, in one of three buffers of shared memory: a bulk copy loads the next row
// while this one is computed and the gradient of the one before leaves by a bulk copy. e stays in float32 registers, of
// at most 4, 6, 8 or 10 vectors a thread (the last number of a kernel's name): one exponential an element, and 10.5
// instructions where a row is aligned. A slice keeps its address's remainder mod 16 in its buffer: whole granules come
// and leave by the bulk copy, the first and last by elements. Its vectors are then shifted out of two granules each, 2
// more instructions an element, and written in pieces, 1 more: so that the order of the sums is the row's own.
//
//   kernel            threads  shared bytes            registers: sm_80  sm_90a  sm_100
//   cluster_128x10        128  416 + 48 vectors a slice              -     164     163
//   cluster_512x4         512  416 + 48 vectors a slice              -     128     126
//   cluster_512x6         512  416 + 48 vectors a slice              -     128     128
//   cluster_512x8         512  416 + 48 vectors a slice              -     128     126
//   cluster_512x10        512  416 + 48 vectors a slice              -     128     128
//   cluster_128_logp      128  416 + 48 vectors a slice              -      96     122
//   cluster_512_logp      512  416 + 48 vectors a slice              -      80     122

#include "cuda/token_rows.h"

namespace redit {

#if REDIT_CLUSTERS_ARE_THERE

namespace {

struct ClusterShared {
  uint64_t full[kStages];
  RowBegin begins[2];  // by turn of the rows
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
  REDIT_DEVICE int edge(int from, int to) const {
    const int t = int(threadIdx.x), last = to > from ? to : from;
    const int at = t < kWide ? (from ? t * (16 / kWide) : end) : 16 * last + (t - kWide) * (16 / kWide);
    return t < 2 * kWide && at >= begin && at < end && (t >= kWide || at < 16) ? at : -1;
  }
};

template <class Type>
REDIT_DEVICE Vector get(const unsigned char* buffer, int v, int shift) {
  const auto* granule = reinterpret_cast<const Vector*>(buffer) + v;
  return shift ? joined<Type>(granule[0], granule[1], uint32_t(shift)) : granule[0];
}

// By pieces where the vector is in two granules, whose other parts are another thread's.
template <class Type>
REDIT_DEVICE void put(unsigned char* buffer, int v, int shift, const Vector& x) {
  unsigned char* at = buffer + 16 * v + shift;
  if (shift == 0) {
    *reinterpret_cast<Vector*>(at) = x;
  } else if (shift % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(at)[i] = x.word[i];
  } else {
    *reinterpret_cast<uint16_t*>(at) = uint16_t(x.word[0]);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      *reinterpret_cast<uint32_t*>(at + 2 + 4 * i) = __funnelshift_r(x.word[i], x.word[i + 1], 16);
    *reinterpret_cast<uint16_t*>(at + 14) = uint16_t(x.word[3] >> 16);
  }
}

// What one warp asks for a row ahead, so that nobody waits for it: the target, and by lanes the bits of an element at
// an edge (0 to 15), of a number (16 to 21) or of the target's logit.
struct Ahead {
  int target = kMasked;
  uint32_t bits = 0;
};
constexpr int kNumberLane = 16, kLogitLane = 22;

template <class Type, bool capped, int kThreads, int kVectors, class Launch>
REDIT_DEVICE void cluster_rows(const Launch& a) {
  using Stored = typename Type::Stored;
  constexpr bool kStore = std::is_same_v<Launch, TokenLossLaunch>;
  constexpr int kWide = Type::kWide, kWarps = kThreads / 32;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<ClusterShared*>(memory);
  unsigned char* ring = memory + kClusterHeader;
  const Matrix& logits = a.op.logits.matrix;
  const int vocabulary = int(logits.columns), vectors = (vocabulary + kWide - 1) / kWide;
  const int t = int(threadIdx.x), rank = device::cluster_rank(), peers = a.slices.count;
  const int from = rank * a.slices.vectors, rest = vectors - from;
  const int count = rest < a.slices.vectors ? rest : a.slices.vectors, row_end = vocabulary - from * kWide;
  const int buffer_bytes = 16 * (a.slices.vectors + 1);
  const int64_t step = device::cluster_count();

  const auto place = [&](const Matrix& matrix, int64_t row) {
    return Place(row_of<Stored>(matrix, row), from, count, vocabulary * int(sizeof(Stored)));
  };
  const auto target_of = [&](int64_t row) {  // by one thread
    return row < logits.rows ? column_of(a.op.logits.targets[row], vocabulary) : kMasked;
  };
  const auto ask = [&](int64_t row, int target) {  // by one warp, whose lane 0 has the target
    Ahead ahead;
    ahead.target = __shfl_sync(~0u, target, 0);
    if (ahead.target == kMasked) return ahead;
    const Place p = place(logits, row);
    const int at = p.template edge<kWide>(p.load_from, p.load_to);
    if (at >= 0)
      ahead.bits = *reinterpret_cast<const Stored*>(p.base + at);
    else if (t >= kNumberLane && t < kLogitLane)
      ahead.bits = __float_as_uint(row_number(a, row, t - kNumberLane));
    else if (t == kLogitLane && ahead.target >= 0)
      ahead.bits = row_of<const Stored>(logits, row)[ahead.target];
    return ahead;
  };
  const auto fetch = [&](int64_t row, int target, int stage) {  // by one thread
    const Place p = place(logits, row);
    const uint32_t bytes = target != kMasked && p.load_to > p.load_from ? uint32_t(p.load_to - p.load_from) * 16 : 0;
    device::mbarrier_expect(&shared.full[stage], bytes);
    if (bytes)
      device::bulk_load(ring + stage * buffer_bytes + 16 * p.load_from, p.base + 16 * p.load_from, bytes,
                        &shared.full[stage]);
  };
  const auto show = [&](int64_t row, const Ahead& ahead, int stage, int slot) {  // by that warp
    RowBegin& begin = shared.begins[slot];
    if (t == 0) begin.target = ahead.target;
    if (ahead.target == kMasked) return;
    if (t >= kNumberLane && t < kLogitLane) begin.numbers[t - kNumberLane] = __uint_as_float(ahead.bits);
    if (t == kLogitLane) begin.at_target = ahead.target >= 0 ? Type::widen(Stored(ahead.bits)) : kNaN;
    const Place p = place(logits, row);
    const int at = p.template edge<kWide>(p.load_from, p.load_to);
    if (at >= 0) *reinterpret_cast<Stored*>(ring + stage * buffer_bytes + at) = Stored(ahead.bits);
  };

  if (t == 0) {
    for (int i = 0; i < kStages; ++i) device::mbarrier_init(&shared.full[i], 1);
    device::fence_mbarrier_init();
  }
  int64_t row = device::cluster_index();
  Ahead ahead;
  int following = kMasked, stage = 0, turn = 0, slot = 0;  // following: the target of the row after
  if (t < 32) {
    if (t == 0) following = target_of(row);
    ahead = ask(row, following);
    show(row, ahead, 0, 0);
    if (t == 0) following = target_of(row + step);
  }
  device::sync_cluster();  // the mbarriers are there, and so are the peers
  if (t == 0) fetch(row, ahead.target, 0);
  uint32_t parity = 0;

  for (; row < logits.rows; row += step) {
    const bool more = row + step < logits.rows;
    const int next = stage + 1 == kStages ? 0 : stage + 1;
    if (more && t < 32) {
      ahead = ask(row + step, following);
      if (t == 0) {
        if (kStore) device::bulk_wait_read<kStages - 2>();
        fetch(row + step, following, next);
        following = target_of(row + 2 * step);
      }
    }
    unsigned char* buffer = ring + stage * buffer_bytes;
    const int shift = int(reinterpret_cast<uintptr_t>(row_of<Stored>(logits, row)) % 16);
    device::mbarrier_wait(&shared.full[stage], parity);
    __syncthreads();  // the edges and the target too are there, and the next row's buffer is free

    const RowBegin& now = shared.begins[slot];
    slot ^= 1;
    const int target = now.target - from * kWide;  // from the slice's first element, as row_end
    RowEnd end{0, 0, 0, false, true};
    float e[kVectors ? kVectors : 1][kWide];
    if (now.target == kMasked) {
      if (t == 0 && rank == 0) finish_masked(a, row);
    } else {
      float anchor = now.at_target;
      for (bool repaired = false;; repaired = true) {
        const Gap<capped> gap(anchor, a.transform);
        RowSums sums{};
        if constexpr (kStore) {
#pragma unroll
          for (int k = 0; k < kVectors; ++k) {
            const int v = k * kThreads + t;
            if (v < count) add<Type, capped>(sums, e[k], get<Type>(buffer, v, shift), v, target, row_end, gap);
          }
        } else {
#pragma unroll 2
          for (int v = t; v < count; v += kThreads)
            add<Type, capped>(sums, e[0], get<Type>(buffer, v, shift), v, target, row_end, gap);
        }
        sums = warp_sum(sums);
        shared.warps.put(sums.others, sums.weighted);
        __syncthreads();
        if (t < 32) {
          const float total = shared.warps.total(kWarps);
          if (t % 16 < peers) device::store_peer(&shared.peers[turn][t / 16][rank], t % 16, total);
        }
        device::sync_cluster();
        if (t < 32) {
          double others = 0, weighted = 0;
          for (int r = 0; r < peers; ++r) others += shared.peers[turn][0][r], weighted += shared.peers[turn][1][r];
          const RowSums all{float(others), float(weighted)};
          const RowEnd found =
              finish_or_repair(a, row, repaired, anchor, now.at_target, all, now.numbers, t == 0 && rank == 0);
          if (t == 0) shared.end = found;
        }
        turn ^= 1;
        __syncthreads();
        end = shared.end;
        if (!end.again) break;
        float top = now.at_target;
        for (int v = t; v < count; v += kThreads) top = largest<Type>(top, get<Type>(buffer, v, shift), v, row_end);
        shared.warps.put(warp_largest(top), 0);
        __syncthreads();
        if (t < 32) {
          top = shared.warps.largest(kWarps);
          if (t < peers) device::store_peer(&shared.peers[turn][0][rank], t, top);
        }
        device::sync_cluster();
        anchor = shared.peers[turn][0][0];
        for (int r = 1; r < peers; ++r) anchor = shared.peers[turn][0][r] > anchor ? shared.peers[turn][0][r] : anchor;
        turn ^= 1;
      }
    }
    if (more && t < 32) show(row + step, ahead, next, slot);
    if constexpr (kStore) {
      if (end.zero) {
        for (int v = t; v <= count; v += kThreads) reinterpret_cast<Vector*>(buffer)[v] = Vector{};
      } else {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int v = k * kThreads + t;
          if (v < count) {
            float g[kWide];
#pragma unroll
            for (int i = 0; i < kWide; ++i) g[i] = e[k][i] * end.constant;
            put<Type>(buffer, v, shift, packed<Type>(g));
          }
        }
        if (target >= 0 && target < count * kWide && target / kWide % kThreads == t)  // who has its vector
          reinterpret_cast<Stored*>(buffer + shift)[target] = Type::narrow(end.at_target);
      }
      device::fence_async();
      __syncthreads();
      const Place out = place(a.op.grad, row);  // of the row's alignment: the plan sees to it
      const int at = out.template edge<kWide>(out.store_from, out.store_to);
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
    stage = next;
    if (stage == 0) parity ^= 1;
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
