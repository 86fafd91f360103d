// Small kernels for test_ptx.py: each right, and with one mistake (`broken`) that the interpreter must find.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device.h"

using namespace redit::device;

struct Args {
  const void* x;
  void* y;
  int n, more;
};

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(1024) name(const __grid_constant__ Args args)
#define VARIANT(name, broken) \
  KERNEL(name##_##broken) { name<broken>(args); }

constexpr int kThreads = 64, kFloats = 4 * kThreads, kStages = 3;

REDIT_DEVICE float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// y[row] = x[row] * sum of x[row], of 2 * kFloats columns: a cluster of two blocks a row, loaded one row ahead.
struct Pipeline {
  uint64_t full[kStages];
  float warps[kThreads / 32], peers[2][2];
};

template <int broken>
REDIT_DEVICE void pipeline(const Args& args) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Pipeline*>(memory);
  auto* ring = reinterpret_cast<float*>(memory + 128);
  const auto* x = static_cast<const float*>(args.x);
  auto* y = static_cast<float*>(args.y);
  const int t = int(threadIdx.x), rank = cluster_rank(), rows = args.n, clusters = cluster_count();
  constexpr uint32_t bytes = kFloats * 4;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(shared.full + i, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  const auto fetch = [&](int row, int stage) {
    constexpr uint32_t size = bytes + (broken == 9 ? 16 : 0);
    mbarrier_expect(shared.full + stage, size);
    bulk_load(ring + stage * kFloats, x + (2 * row + rank) * kFloats, size, shared.full + stage);
  };
  int stage = 0, turn = 0;
  uint32_t parity = 0;
  if (t == 0 && cluster_index() < rows) fetch(cluster_index(), 0);
  for (int row = cluster_index(); row < rows; row += clusters) {
    const int next = (stage + 1) % kStages;
    if (t == 0 && (row + clusters < rows || broken == 12)) {
      if (broken != 4) bulk_wait_read<1>();
      fetch(broken == 12 ? row : row + clusters, next);
    }
    if (broken != 3) mbarrier_wait(shared.full + stage, parity);
    auto* mine = reinterpret_cast<float4*>(ring + stage * kFloats) + t;
    float4 v = *mine;
    const float sum = warp_sum((v.x + v.y) + (v.z + v.w));
    if (t % 32 == 0) shared.warps[t / 32] = sum;
    if (broken != 1) __syncthreads();
    if (t < 2) store_peer(&shared.peers[turn][rank], t, shared.warps[0] + shared.warps[1]);
    if (broken == 2)
      __syncthreads();
    else
      sync_cluster();
    const float total = shared.peers[turn][0] + shared.peers[turn][1];
    if (broken != 8) turn ^= 1;
    *mine = make_float4(v.x * total, v.y * total, v.z * total, v.w * total);
    if (broken != 6) fence_async();
    if (broken != 5) __syncthreads();
    if (t == 0) {
      bulk_store(y + (2 * row + rank) * kFloats + (broken == 10 ? 1 : 0), ring + stage * kFloats, bytes);
      bulk_commit();
    }
    stage = next;
    if (stage == 0 && broken != 7) parity ^= 1;
  }
  if (t == 0 && broken != 11) bulk_wait<0>();
  sync_cluster();
}
VARIANT(pipeline, 0)
VARIANT(pipeline, 1)
VARIANT(pipeline, 2)
VARIANT(pipeline, 3)
VARIANT(pipeline, 4)
VARIANT(pipeline, 5)
VARIANT(pipeline, 6)
VARIANT(pipeline, 7)
VARIANT(pipeline, 8)
VARIANT(pipeline, 9)
VARIANT(pipeline, 10)
VARIANT(pipeline, 11)
VARIANT(pipeline, 12)

// y = x + 1 by one warp that loads and two that compute, over two stages of 64 floats.
template <int broken>
REDIT_DEVICE void ring(const Args& args) {
  __shared__ __align__(128) float stages[2][64];
  __shared__ uint64_t full[2], empty[2];
  const auto* x = static_cast<const float*>(args.x);
  const int t = int(threadIdx.x), tiles = args.n;
  if (t == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 64);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % 2;
    const uint32_t parity = uint32_t(i / 2) & 1;
    if (t == 0) {
      if (broken != 1) mbarrier_wait(empty + stage, parity ^ 1);
      mbarrier_expect(full + stage, broken == 4 ? 272 : 256);
      bulk_load(stages[stage], x + 64 * i, 256, full + stage);
    } else if (t >= 32) {
      if (broken != 2) mbarrier_wait(full + stage, parity);
      static_cast<float*>(args.y)[64 * i + t - 32] = stages[stage][t - 32] + 1;
      if (broken != 3) mbarrier_arrive(empty + stage);
    }
  }
}
VARIANT(ring, 0)
VARIANT(ring, 1)
VARIANT(ring, 2)
VARIANT(ring, 3)
VARIANT(ring, 4)

// A block that the other of its cluster reaches into leaves after that.
template <int broken>
REDIT_DEVICE void neighbours(const Args& args) {
  __shared__ float slot;
  __shared__ uint64_t arrived;
  if (threadIdx.x == 0) mbarrier_init(&arrived, 1);
  fence_mbarrier_init();
  sync_cluster();
  if (threadIdx.x == 0 && (broken != 3 || cluster_rank() == 0)) {
    if (broken != 2) store_peer(&slot, cluster_rank() ^ 1, float(cluster_rank()));
    if (broken != 1) mbarrier_arrive_peer(&arrived, cluster_rank() ^ 1);
  }
  if (broken) return;
  sync_cluster();
  static_cast<float*>(args.y)[blockIdx.x * 64 + threadIdx.x] = slot;
}
VARIANT(neighbours, 0)
VARIANT(neighbours, 1)
VARIANT(neighbours, 2)
VARIANT(neighbours, 3)

// Each row of y: the sums over warps of x's columns, through shared memory that every row uses again.
template <int broken>
REDIT_DEVICE void rows(const Args& args) {
  __shared__ float warps[2];
  const int t = int(threadIdx.x);
  for (int row = 0; row < args.n; ++row) {
    const float sum = warp_sum(static_cast<const float*>(args.x)[row * 64 + t]);
    if (t % 32 == 0) warps[t / 32] = sum;
    __syncthreads();
    static_cast<float*>(args.y)[row * 64 + t] = warps[0] + warps[1];
    if (broken != 1) __syncthreads();
  }
}
VARIANT(rows, 0)
VARIANT(rows, 1)

// Single mistakes.
KERNEL(copy) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < args.n) static_cast<float*>(args.y)[i] = static_cast<const float*>(args.x)[i];
}
KERNEL(copy_vectors) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < args.n) static_cast<float4*>(args.y)[i] = static_cast<const float4*>(args.x)[i];
}
KERNEL(write_together) { static_cast<int*>(args.y)[blockIdx.x * args.n] = int(threadIdx.x) * args.more; }
KERNEL(read_what_another_block_writes) {
  if (threadIdx.x == 0) static_cast<int*>(args.y)[blockIdx.x] = static_cast<int*>(args.y)[args.more] + 1;
}
KERNEL(past_shared_memory) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = 1;
  __syncthreads();
  static_cast<float*>(args.y)[threadIdx.x] = dynamic[threadIdx.x ^ 1];
}
KERNEL(different_barriers) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    sync_cluster();
}
KERNEL(half_a_block) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  static_cast<int*>(args.y)[threadIdx.x] = int(threadIdx.x);
}
KERNEL(half_a_warp) {
  if (threadIdx.x % 2) return;
  static_cast<float*>(args.y)[threadIdx.x] = __shfl_xor_sync(0x55555555u, float(threadIdx.x), 2);
}
KERNEL(atomic) { atomicAdd(static_cast<float*>(args.y), 1.0f); }
KERNEL(fused_double) {
  const auto* x = static_cast<const double*>(args.x) + threadIdx.x;
  static_cast<double*>(args.y)[threadIdx.x] = fma(x[0], x[args.n], x[2 * args.n]);
}
// Words that move between lanes, and bytes within words.
KERNEL(words) {
  const int t = int(threadIdx.x);
  const auto* x = static_cast<const uint32_t*>(args.x) + t;
  auto* y = static_cast<uint32_t*>(args.y) + t;
  const uint32_t a = x[0], b = x[args.n], c = x[2 * args.n];
  y[0] = __shfl_down_sync(~0u, a, 3), y[args.n] = __shfl_sync(~0u, a, (t + 5) % 64);
  y[2 * args.n] = __funnelshift_r(a, b, c), y[3 * args.n] = __byte_perm(a, b, c);
  uint32_t signs;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(signs) : "r"(a), "r"(b), "r"(c));
  y[4 * args.n] = signs;
}
KERNEL(for_ever) {
  while (true) asm volatile("" ::: "memory");
}
KERNEL(trapped) {
  if (threadIdx.x == 5) __trap();
}

// Lanes that part and meet again: the shuffle needs all of them.
KERNEL(diverge) {
  const int t = int(threadIdx.x);
  int steps = 0;
  for (int x = t; x > 1; x = x % 2 ? 3 * x + 1 : x / 2) ++steps;
  if (t % 3 == 0)
    steps += 100;
  else if (t % 3 == 1)
    steps -= 7;
  static_cast<int*>(args.y)[blockIdx.y * 64 + t] = steps + 1000 * __shfl_xor_sync(0xFFFFFFFFu, steps, 1);
}

// y[operation][i] of x[0][i], x[1][i], x[2][i]
KERNEL(floats) {
  const int i = int(threadIdx.x), n = args.n;
  const auto* in = static_cast<const float*>(args.x);
  auto* out = static_cast<float*>(args.y);
  const float x = in[i], y = in[n + i], z = in[2 * n + i];
  const float results[] = {
      fmaf(x, y, z),     x / y,       sqrtf(fabsf(x)), 1 / x,       __fadd_rz(x, y), __fmaf_rd(x, y, z),
      __fmul_ru(x, y),   __fsub_rd(x, y), fmaxf(x, y), max_nan(x, y), fminf(x, y),   __saturatef(x),
      rintf(x),          truncf(x),   exp2_approx(x),  exp2_approx(y)};
  for (int k = 0; k < 16; ++k) out[k * n + i] = results[k];
}
KERNEL(doubles) {
  const int i = int(threadIdx.x), n = args.n;
  const auto* in = static_cast<const double*>(args.x);
  auto* out = static_cast<double*>(args.y);
  const double x = in[i], y = in[n + i], z = in[2 * n + i];
  double reciprocal;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(reciprocal) : "d"(x));
  out[i] = fma(x, y, z), out[n + i] = reciprocal, out[2 * n + i] = copysign(x, y);
}
KERNEL(halves) {
  const int i = int(threadIdx.x), n = args.n;
  const auto* in = static_cast<const float*>(args.x);
  auto* out = static_cast<uint32_t*>(args.y);
  out[i] = pack_bfloat16(in[i], in[n + i]);
  out[n + i] = pack_float16(in[i], in[n + i]);
  const uint32_t bits = __float_as_uint(in[i]);
  out[2 * n + i] = __float_as_uint(__bfloat162float(__ushort_as_bfloat16(uint16_t(bits))));
  out[3 * n + i] = __float_as_uint(__half2float(__ushort_as_half(uint16_t(bits))));
}
KERNEL(integers) {
  const int i = int(threadIdx.x), n = args.n;
  const auto* in = static_cast<const int64_t*>(args.x);
  auto* out = static_cast<int64_t*>(args.y);
  const int64_t x = in[i], y = in[n + i];
  const int a = int(x), b = int(y);
  const int64_t results[] = {x * y,
                             int64_t(uint32_t(a)) * int64_t(uint32_t(b)),
                             int64_t(__umulhi(uint32_t(a), uint32_t(b))),
                             int64_t(__mulhi(a, b)),
                             x >> (b & 63),
                             int64_t(uint64_t(x) >> (b & 63)),
                             x << (b & 63),
                             int64_t(a >> (b & 31)),
                             int64_t(uint32_t(a) << (b & 31)),
                             b ? a / b : 0,
                             b ? a % b : 0,
                             x < y ? 1 : 2,
                             uint64_t(x) < uint64_t(y) ? 1 : 2,
                             int64_t(int16_t(a)) + int64_t(uint8_t(b)),
                             min(a, b),
                             int64_t(double(x)) == 0 ? 1 : int64_t(__double_as_longlong(double(x) * 0.5))};
  for (int k = 0; k < 16; ++k) out[k * n + i] = results[k];
}

// e = x w^T of bfloat16, 128 rows of each a block: a cluster of two along x shares its tiles of w, each half loaded by
// one of them into both. One producer warp group, two that multiply.
struct HeadArgs {
  TensorMap x, w;
  float* e;
  int width, columns;
};
constexpr int kDeep = 64, kRing = 3;
struct alignas(1024) Tiles {
  uint16_t x[128 * kDeep], w[128 * kDeep];
};

// The 8 rows from `more` and 64 columns from `n` of a matrix, found where the swizzle puts them: 16 bytes apart by row.
struct BoxArgs {
  TensorMap map;
  uint16_t* y;
  int n, more;
};
extern "C" __global__ void __launch_bounds__(64) box(const __grid_constant__ BoxArgs args) {
  __shared__ __align__(1024) uint16_t tile[8 * 64];
  __shared__ uint64_t full;
  const int t = int(threadIdx.x);
  if (t == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_expect(&full, sizeof tile);
    tensor_load(tile, &args.map, args.n, args.more, &full);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  for (int row = 0; row < 8; ++row) args.y[row * 64 + t] = tile[row * 64 + (t ^ row * 8)];
}

template <int broken>
REDIT_DEVICE void head(const HeadArgs& args) {
  extern __shared__ __align__(1024) unsigned char stages[];
  auto* tiles = reinterpret_cast<Tiles*>(stages);
  auto* full = reinterpret_cast<uint64_t*>(stages + kRing * sizeof(Tiles));
  auto* empty = full + kRing;
  const int t = int(threadIdx.x), group = t / 128, rank = cluster_rank(), steps = args.width / kDeep;
  if (t == 0) {
    for (int i = 0; i < kRing; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 4);
    fence_mbarrier_init();
  }
  sync_cluster();
  if (group == 0) {
    for (int s = 0; t == 0 && s < steps; ++s) {
      const int i = s % kRing;
      if (broken != 1) mbarrier_wait(empty + i, uint32_t(s / kRing + 1) & 1);
      mbarrier_expect(full + i, sizeof(Tiles));
      tensor_load(tiles[i].x, &args.x, kDeep * s, int(blockIdx.x) * 128, full + i);
      tensor_load_multicast(tiles[i].w + rank * 64 * kDeep, &args.w, kDeep * s, int(blockIdx.y) * 128 + rank * 64,
                            full + i, broken == 3 ? 1 : 3);
    }
  } else {
    Accumulator<128> sum{};
    for (int s = 0; s < steps; ++s) {
      const int i = s % kRing;
      if (broken != 2) mbarrier_wait(full + i, uint32_t(s / kRing) & 1);
      wgmma_fence();
      for (int k = 0; k < kDeep; k += 16)
        wgmma(sum, wgmma_tile(tiles[i].x + (group - 1) * 64 * kDeep + k, broken == 4 ? 512 : 1024),
              wgmma_tile(tiles[i].w + k, 1024));
      wgmma_commit();
      if (broken != 5) wgmma_wait<0>();
      if (t % 128 < 2) mbarrier_arrive_peer(empty + i, t % 128);
    }
    const int warp = t % 128 / 32, lane = t % 32;
    const int row = int(blockIdx.x) * 128 + (group - 1) * 64 + warp * 16 + lane / 4;
    for (int i = 0; i < 64; ++i)
      args.e[(row + i / 2 % 2 * 8) * args.columns + int(blockIdx.y) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum.d[i];
  }
  if (broken != 6) sync_cluster();
}
#define HEAD(broken) \
  extern "C" __global__ void __launch_bounds__(384) head_##broken(const __grid_constant__ HeadArgs args) { head<broken>(args); }
HEAD(0)
HEAD(1)
HEAD(2)
HEAD(3)
HEAD(4)
HEAD(5)
HEAD(6)
