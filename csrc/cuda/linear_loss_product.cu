// The product of the head with its exponentials at the end, bfloat16 on sm_90a; linear_loss.cu has the rest.
//
//   E = exp(x w^T - anchor) dz/dx        2 R V D operations; reads x and w as often as the L2 cache asks, writes E once
//
// A cluster of two blocks has 256 rows of x and 256 of w, a part: each block its own 128 of x, and of w both the same,
// of which each loads half for both. A stage is 64 deep and 48 KB, and four of them are a ring: one warp fills it, two
// warpgroups of 64 rows each multiply, with the sums in 128 registers a thread, and then take the exponentials there.
// Blocks stay, and go from tile to tile: the ring is filled ahead during the exponentials. A row's sums go over D in
// order, whatever the other rows. E goes to memory from registers, 4 bytes a thread and 16 in a row: of the time of a
// product 4096 deep the 64 KB of a tile are too little to be staged in shared memory.
//
//   kernel        threads  shared bytes  registers: sm_80  sm_90a  sm_100
//   product           384        197696                -     168       -
//   product_grad      384        197696                -     168       -

#include "cuda/head_rows.h"

namespace redit {

#if REDIT_WGMMA_IS_THERE

namespace {

constexpr int kDepth = cuda::kBoxColumns, kGroup = 128, kPerRow = kPart / 4;  // of a row a thread has a quarter

struct Stage {
  uint16_t x[kProductRows * kDepth], w[kPart * kDepth];
};

struct Ring {
  Stage stages[kProductStages];
  uint64_t full[kProductStages], empty[kProductStages];
};
static_assert(sizeof(Ring) + 1024 == kProductShared);

// A place in the ring, and how often it has come round.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  REDIT_DEVICE void next() {
    if (++stage == kProductStages) stage = 0, parity ^= 1;
  }
};

struct Tiles {  // of a cluster, one after the other; neighbours have the same columns
  int pairs, count, steps;

  REDIT_DEVICE explicit Tiles(const ProductLaunch& p)
      : pairs(int((p.head.head.hidden.rows - 1) / (kProductPeers * kProductRows)) + 1),
        count(pairs * p.parts),
        steps(int((p.head.head.hidden.columns - 1) / kDepth) + 1) {}
  REDIT_DEVICE int first_row(int tile) const {  // of this block
    return (tile % pairs * kProductPeers + device::cluster_rank()) * kProductRows;
  }
  REDIT_DEVICE int part(int tile) const { return tile / pairs; }
};

// One warp; its first lane starts the copies.
REDIT_DEVICE void load(const ProductLaunch& p, Ring& ring) {
  const Tiles tiles(p);
  const int rank = device::cluster_rank();
  Turn turn;
  for (int tile = device::cluster_index(); tile < tiles.count; tile += device::cluster_count()) {
    const int row = tiles.first_row(tile), column = tiles.part(tile) * kPart + rank * kProductRows;
    for (int s = 0; s < tiles.steps; ++s, turn.next()) {
      Stage& stage = ring.stages[turn.stage];
      uint64_t* full = ring.full + turn.stage;
      device::mbarrier_wait(ring.empty + turn.stage, turn.parity ^ 1);
      if (threadIdx.x % 32 != 0) continue;
      device::mbarrier_expect(full, sizeof(Stage));
      device::tensor_load(stage.x, &p.hidden, s * kDepth, row, full);
      device::tensor_load_multicast(stage.w + rank * kProductRows * kDepth, &p.weight, s * kDepth, column, full, 3);
    }
  }
}

// A thread's quarter of a part of a row, as the product left it.
template <bool sums>
REDIT_DEVICE void exponentials(const HeadLaunch& a, int64_t r, int64_t part, float (&x)[kPerRow]) {
  const int64_t vocabulary = a.head.weight.rows, first = part * kPart, rest = vocabulary - first;
  const bool there = r < a.head.hidden.rows;
  const HeadRow row = there ? a.rows[r] : HeadRow{};
  const int64_t place = (there ? a.targets[r] : -1) - first;
  const int lane = int(threadIdx.x) % 4, left = int(rest < kPart ? rest : kPart);
  const int target = place >= 0 && place < kPart ? int(place) : -1;
  const auto column = [&](int i) { return i / 2 * 8 + lane * 2 + i % 2; };
  if (const Matrix& bias = a.head.bias; bias.data) {
    const auto* from = static_cast<const uint16_t*>(bias.data) + first;
#pragma unroll
    for (int i = 0; i < kPerRow; ++i)
      if (column(i) < left) x[i] += float_of_bfloat16(from[column(i)]);
  }
  const auto left_out = [&](int i) { return column(i) >= left || column(i) == target; };
  const bool some = left < kPart || target >= 0;
  const HeadPart found = a.transform.capped ? redit::exponentials<sums, true, 4>(x, row, some, left_out, a.transform)
                                            : redit::exponentials<sums, false, 4>(x, row, some, left_out, a.transform);
  if (!there) return;
  if (sums && lane == 0) a.parts[r * a.part_count + part] = found;
  if (!a.e.data) return;
  if (!sums && (target >= 0 || !is_number(row.total))) {
#pragma unroll
    for (int i = 0; i < kPerRow; ++i) x[i] = !is_number(row.total) ? 0 : column(i) == target ? row.e_at_target : x[i];
  }
  auto* to = static_cast<uint16_t*>(a.e.data) + r * a.e.row_stride + first;
  if (left == kPart && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerRow; i += 2)
      *reinterpret_cast<uint32_t*>(to + column(i)) = device::pack_bfloat16(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerRow; ++i)
      if (column(i) < left) to[column(i)] = uint16_t(device::pack_bfloat16(x[i], 0));
  }
}

template <bool sums>
REDIT_DEVICE void multiply(const ProductLaunch& p, Ring& ring) {
  const Tiles tiles(p);
  const int t = int(threadIdx.x) % kGroup, rows = (int(threadIdx.x) / kGroup - 1) * 64;  // of the block's 128
  const auto release = [&](int stage) {  // to both blocks, which fill half of it each
    if (t < kProductPeers) device::mbarrier_arrive_peer(ring.empty + stage, t);
  };
  Turn turn;
  for (int tile = device::cluster_index(); tile < tiles.count; tile += device::cluster_count()) {
    device::Accumulator<kPart> product{};
    int before = 0;
    for (int s = 0; s < tiles.steps; ++s, turn.next()) {
      const Stage& stage = ring.stages[turn.stage];
      device::mbarrier_wait(ring.full + turn.stage, turn.parity);
      device::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16)
        device::wgmma(product, device::wgmma_tile(stage.x + rows * kDepth + k, 1024),
                      device::wgmma_tile(stage.w + k, 1024));
      device::wgmma_commit();
      device::wgmma_wait<1>();  // the stage before is read, while this one is multiplied
      if (s > 0) release(before);
      before = turn.stage;
    }
    device::wgmma_wait<0>();
    release(before);
    const int64_t row = tiles.first_row(tile) + rows + t / 32 * 16 + t % 32 / 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {  // once in the code, which is long
      float x[kPerRow];
#pragma unroll
      for (int i = 0; i < kPerRow; ++i) {
        float* d = product.d + i / 2 * 4 + i % 2;
        x[i] = d[0], d[0] = d[2];
      }
      exponentials<sums>(p.head, row + half * 8, p.first_part + tiles.part(tile), x);
    }
  }
}

template <bool sums>
REDIT_DEVICE void product(const ProductLaunch& p) {
  extern __shared__ unsigned char memory[];
  // The swizzle goes by the bits of the address: stages begin at multiples of 1024.
  Ring& ring = *reinterpret_cast<Ring*>(memory + (-device::shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kProductStages; ++i) {
      device::mbarrier_init(ring.full + i, 1);
      device::mbarrier_init(ring.empty + i, 2 * kProductPeers);  // each warpgroup of both blocks
    }
    device::fence_mbarrier_init();
  }
  device::sync_cluster();
  if (threadIdx.x < kGroup) {
    device::leave_registers<40>();
    if (threadIdx.x < 32) load(p, ring);
  } else {
    device::take_registers<232>();
    multiply<sums>(p, ring);
  }
  device::sync_cluster();  // nobody writes into the memory of a block that has left
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kProductThreads, 1)
    linear_loss_product(const __grid_constant__ ProductLaunch p) {
  product<true>(p);
}
extern "C" __global__ void __launch_bounds__(kProductThreads, 1)
    linear_loss_product_grad(const __grid_constant__ ProductLaunch p) {
  product<false>(p);
}

#else

extern "C" __global__ void __launch_bounds__(32) linear_loss_product(const __grid_constant__ ProductLaunch) {}
extern "C" __global__ void __launch_bounds__(32) linear_loss_product_grad(const __grid_constant__ ProductLaunch) {}

#endif

cuda::Kernels cuda::linear_loss_product_kernels() {
  return {REDIT_KERNEL(linear_loss_product), REDIT_KERNEL(linear_loss_product_grad)};
}

}  // namespace redit
