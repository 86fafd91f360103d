// What a kernel asks of the device that C++ has no word for, and softcap, which is made of it. All inline assembly of
// csrc/cuda is here; the PTX ISA's own names are in the comments. Clusters, mbarriers and bulk copies need sm_90.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"
#include "shared/row_math.h"

#define REDIT_DEVICE __device__ __forceinline__
#define REDIT_KERNEL(name) {#name, reinterpret_cast<const void*>(&name)}  // of a list of cuda/launch.h

// The host has one stub a kernel for all architectures, so a kernel is there on each. Where the architecture lacks its
// instructions it is empty and takes 32 threads, which tells launch.cpp that it cannot run.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define REDIT_CLUSTERS_ARE_THERE 0
#else
#define REDIT_CLUSTERS_ARE_THERE 1
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define REDIT_WGMMA_IS_THERE 0
#else
#define REDIT_WGMMA_IS_THERE 1
#endif

namespace redit::device {

REDIT_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 2^x, at most 2 ulp off, subnormal results flushed: ex2.approx.ftz
REDIT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, at most 1 ulp off: rcp.approx
REDIT_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger; NaN if either is: max.NaN
REDIT_DEVICE float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Two floats as 16-bit numbers in a word, to nearest even.
REDIT_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
REDIT_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// To nearest, here and not again in every turn of the loop that uses it: cvt.rn
REDIT_DEVICE float to_float(double x) {
  float y;
  asm volatile("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x));
  return y;
}

REDIT_DEVICE float float_of_float16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// 16 bytes of global memory at a multiple of 16. What is read again soon should stay in the L2 cache, what is not
// should make room: createpolicy, ld with a cache hint.

struct alignas(16) Vector {
  uint32_t word[4];
};
REDIT_DEVICE uint64_t keep_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
REDIT_DEVICE uint64_t drop_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
REDIT_DEVICE Vector load16(const void* p, uint64_t policy) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p), "l"(policy)
               : "memory");
  return v;
}
REDIT_DEVICE void store16(void* p, const Vector& v) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

// threadIdx.x, read again each time: what follows from it then takes no register of a loop that has none to spare.
REDIT_DEVICE int thread() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return int(index);
}

// Clusters: barrier.cluster, mapa.

REDIT_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
REDIT_DEVICE int cluster_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return int(index);
}
REDIT_DEVICE int cluster_count() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return int(count);
}

// Writes before are visible to the whole cluster after.
REDIT_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Address of p's place in the shared memory of block `rank` of the cluster.
REDIT_DEVICE uint32_t peer_address(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
REDIT_DEVICE void store_peer(float* p, int rank, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(peer_address(p, rank)), "f"(x) : "memory");
}
REDIT_DEVICE void store_peer(double* p, int rank, double x) {
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(peer_address(p, rank)), "d"(x) : "memory");
}

// mbarriers: a phase is over when `count` threads have arrived and all bytes that they expect have come.

REDIT_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After the inits, before the cluster's barrier that shows them to others: fence.mbarrier_init
REDIT_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
REDIT_DEVICE void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
REDIT_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
REDIT_DEVICE void mbarrier_arrive_peer(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_address(barrier, rank))
               : "memory");
}
// Until the phase of this parity is over. A debug build traps after 2^26 tries, so that a hang names its barrier.
REDIT_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  [[maybe_unused]] int tries = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#ifdef REDIT_DEBUG
    if (++tries == 1 << 26) __trap();
#endif
  }
}

// Bulk copies, of multiples of 16 bytes between addresses that are multiples of 16: cp.async.bulk

REDIT_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Of shared memory that other instructions wrote: after their thread's fence_async and a barrier.
REDIT_DEVICE void bulk_store(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
REDIT_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `open` groups of this thread's bulk stores have read their bytes, or have written them.
template <int open>
REDIT_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(open) : "memory");
}
template <int open>
REDIT_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(open) : "memory");
}
// Shows this thread's writes to asynchronous copies: fence.proxy.async
REDIT_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Boxes of a matrix of 16-bit elements, 64 wide, stored with the 128-byte swizzle: cp.async.bulk.tensor

REDIT_DEVICE void tensor_load(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// Into the same place of every block whose bit is set, whose mbarrier at the same place counts the bytes.
REDIT_DEVICE void tensor_load_multicast(void* to, const TensorMap* map, int column, int row, uint64_t* barrier,
                                        int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(uint16_t(blocks))
      : "memory");
}

// Products of bfloat16 by a warpgroup, sm_90a only: wgmma. Thread t has of row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2)
// the column 8 (i / 4) + 2 (t % 4) + i % 2 in d[i].

template <int columns>
struct Accumulator {
  float d[columns / 2];
};
// A tile in shared memory with the 128-byte swizzle, `step` bytes from eight rows to the next.
REDIT_DEVICE uint64_t wgmma_tile(const void* p, int step) {
  return (shared_address(p) & 0x3FFFF) >> 4 | uint64_t(1) << 16 | uint64_t(step >> 4) << 32 | uint64_t(1) << 62;
}
REDIT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
REDIT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int open>
REDIT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(open) : "memory");
}
// setmaxnreg, by all warps of a warpgroup: how many registers a thread of it has from here on.
template <int registers>
REDIT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
REDIT_DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

#define REDIT_D8(i)                                                                                       \
  "+f"(a.d[i]), "+f"(a.d[i + 1]), "+f"(a.d[i + 2]), "+f"(a.d[i + 3]), "+f"(a.d[i + 4]), "+f"(a.d[i + 5]), \
      "+f"(a.d[i + 6]), "+f"(a.d[i + 7])
#define REDIT_D64(i)                                                                                    \
  REDIT_D8(i), REDIT_D8(i + 8), REDIT_D8(i + 16), REDIT_D8(i + 24), REDIT_D8(i + 32), REDIT_D8(i + 40), \
      REDIT_D8(i + 48), REDIT_D8(i + 56)
// a += x w^T, 64 x 16 times 16 x 128
REDIT_DEVICE void wgmma(Accumulator<128>& a, uint64_t x, uint64_t w) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.eq.u32 keep, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63"
      "}, %64, %65, keep, 1, 1, 0, 0;\n}"
      : REDIT_D64(0)
      : "l"(x), "l"(w));
}
// a += x w^T, 64 x 16 times 16 x 256
REDIT_DEVICE void wgmma(Accumulator<256>& a, uint64_t x, uint64_t w) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.eq.u32 keep, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "
      "%119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, keep, 1, 1, 0, 0;\n}"
      : REDIT_D64(0), REDIT_D64(64)
      : "l"(x), "l"(w));
}
#undef REDIT_D8
#undef REDIT_D64

}  // namespace redit::device

namespace redit {

// Under softcap tanh(x inner), where inner is logit_scale / softcap, to 2e-7; else x.
template <bool capped>
REDIT_DEVICE float squash(float x, const TransformConstants& t) {
  if (!capped) return x;
  const float inner = t.inner * float(2 / kLn2);
  return fmaf(-2.0f, device::rcp_approx(1.0f + device::exp2_approx(x * inner)), 1.0f);
}

}  // namespace redit
