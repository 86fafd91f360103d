// The head around its products; redit_fast/backends/reference/linear_loss.py is the definition.
//
//   e_j = exp(z_j - z_t), E_j = e_j dz/dx_j, in tiles of the vocabulary      reads 4 bytes an element, from the cache
//                                                                            where a tile fits it; writes E
//
// cuBLAS makes a tile of the logits in float32 before each `tile`. The anchor is the target's logit, and 256 columns
// are one partial sum. A part with a logit more than 40 above the anchor is seen from its own largest, and `finish`
// scales its E where the row's last anchor is another: nothing overflows, no product is made twice, and the host need
// not know. The backward pass goes on from the sums that the forward pass left: its products once more, and no sum.
//
//   kernel     threads  shared bytes  registers: sm_80  sm_90a  sm_100
//   anchor         256            32               59      61      40
//   resume         256            32               60      61      40
//   tile           512             0               32      32      31
//   tile_grad      512             0               32      32      32
//   finish         256           136               40      43      50
//
// A block of `anchor`, `resume` and `finish` has a row, and one of a tile a row of it: 512 threads where the tile has
// 4096 columns, 128 where it has 1024.

#include "cuda/head_rows.h"

namespace redit {

namespace {

constexpr int kWarps = kHeadThreads / 32;

// Of all threads of a block of kHeadThreads, in the order of the warps. `shared` may be used again after a barrier.
REDIT_DEVICE float block_sum(float x, float (&shared)[kWarps]) {
  x = sum_over<32>(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  return total;
}

// The logit of the row's target; NaN where there is none.
REDIT_DEVICE float target_logit(const HeadLaunch& a, int64_t row, float (&shared)[kWarps]) {
  const auto& [hidden, weight, bias, type] = a.head;
  const int64_t target = a.targets[row];
  if (stray(target, weight.rows)) return kNaN;
  float sum = 0;
  for (int64_t d = threadIdx.x; d < hidden.columns; d += kHeadThreads)
    sum += element(hidden.data, row * hidden.row_stride + d * hidden.column_stride, type) *
           element(weight.data, target * weight.row_stride + d * weight.column_stride, type);
  const float logit = block_sum(sum, shared);
  return bias.data ? logit + element(bias.data, target, type) : logit;
}

REDIT_DEVICE void anchor(const HeadLaunch& a) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  const float logit = target_logit(a, row, shared);
  if (threadIdx.x == 0) a.rows[row] = {logit, logit, float(a.transform.slope), 0, 0, 1};
}

// What `finish` left, with the slopes of the upstream gradients.
REDIT_DEVICE void resume(const HeadLaunch& a) {
  __shared__ float shared[kWarps];
  const int64_t r = blockIdx.x;
  const float logit = target_logit(a, r, shared);
  if (threadIdx.x != 0) return;
  const float* sums = static_cast<const float*>(a.upstream.sums.data) + r;
  const int64_t stride = a.upstream.sums.row_stride;
  const bool bonus = a.upstream.grad_entropy;
  const float g = a.upstream.grad_logp[r], h = bonus ? a.upstream.grad_entropy[r] : 0;
  const Row row{sums[0], sums[stride], sums[2 * stride], logit, 0, bonus ? a.upstream.entropy[r] : 0};
  const Slopes slopes = slopes_of(row, g, h, -1, a.transform);
  a.rows[r] = {logit,    row.anchor, slopes.constant, slopes.by_gap, gradient_at_target(row, g, h, -1, a.transform),
               row.total};
}

// A thread's columns, the first of which is `first`, into E.
REDIT_DEVICE void store(const HeadLaunch& a, int64_t row, int64_t first, const float (&x)[kPerThread]) {
  const int64_t left = a.e.columns - first, at = row * a.e.row_stride + first * a.e.column_stride;
  const bool wide = a.e_type == Dtype::float32;
  char* to = static_cast<char*>(a.e.data) + at * (wide ? 4 : 2);
  if (left < kPerThread || a.e.column_stride != 1 || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (i < left) set_element(a.e.data, at + i * a.e.column_stride, a.e_type, x[i]);
  } else if (wide) {
    reinterpret_cast<float4*>(to)[0] = {x[0], x[1], x[2], x[3]};
    reinterpret_cast<float4*>(to)[1] = {x[4], x[5], x[6], x[7]};
  } else if (a.e_type == Dtype::bfloat16) {
    *reinterpret_cast<uint4*>(to) = {device::pack_bfloat16(x[0], x[1]), device::pack_bfloat16(x[2], x[3]),
                                     device::pack_bfloat16(x[4], x[5]), device::pack_bfloat16(x[6], x[7])};
  } else {
    *reinterpret_cast<uint4*>(to) = {device::pack_float16(x[0], x[1]), device::pack_float16(x[2], x[3]),
                                     device::pack_float16(x[4], x[5]), device::pack_float16(x[6], x[7])};
  }
}

// A warp has a part, a thread eight columns. sums: the forward pass, to which the target's E comes at the end.
template <bool sums>
REDIT_DEVICE void tile(const HeadLaunch& a) {
  const int64_t r = blockIdx.x, vocabulary = a.head.weight.rows;
  const int64_t first = a.first_column + int64_t(threadIdx.x) * kPerThread;
  if (first / kPart * kPart >= vocabulary) return;
  const HeadRow row = a.rows[r];
  const int64_t left = vocabulary - first, target = a.targets[r] - first;
  const auto* logits = reinterpret_cast<const float4*>(static_cast<const float*>(a.logits.data) +
                                                       r * a.logits.row_stride + threadIdx.x * kPerThread);
  const float4 low = logits[0], high = logits[1];
  float x[kPerThread]{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (const Matrix& bias = a.head.bias; bias.data) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (i < left) x[i] += element(bias.data, first + i, a.head.type);
  }
  const auto left_out = [&](int i) { return i >= left || i == target; };
  const HeadPart part = a.transform.capped ? exponentials<sums, true, 32>(x, row, true, left_out, a.transform)
                                           : exponentials<sums, false, 32>(x, row, true, left_out, a.transform);
  if (sums && threadIdx.x % 32 == 0) a.parts[r * a.part_count + first / kPart] = part;
  if (!a.e.data) return;
#pragma unroll
  for (int i = 0; i < kPerThread && !sums; ++i) x[i] = !is_number(row.total) ? 0 : i == target ? row.e_at_target : x[i];
  store(a, r, first, x);
}

// The sums of a part, from another anchor. Where nothing was added the gap may be no number.
template <bool capped>
REDIT_DEVICE RowSums moved(const HeadPart& part, float anchor, const TransformConstants& t) {
  if (part.others == 0) return {0, 0};
  const float by = gap<capped>(part.anchor, anchor, t), factor = device::exp2_approx(by);
  return {part.others * factor, factor * (part.weighted + part.others * by)};
}

// A row of E to its last anchor: every part that was seen from another.
template <bool capped>
REDIT_DEVICE void rescale(const HeadLaunch& a, int64_t r, float anchor, bool keep) {
  for (int64_t p = 0, column = threadIdx.x; column < a.e.columns; ++p, column += kPart) {
    const float from = a.parts[r * a.part_count + p].anchor;
    if (keep && from == anchor) continue;
    const int64_t at = r * a.e.row_stride + column * a.e.column_stride;
    const float old = keep ? element(a.e.data, at, a.e_type) : 0;
    const float x = old == 0 ? 0 : old * device::exp2_approx(gap<capped>(from, anchor, a.transform));
    set_element(a.e.data, at, a.e_type, x);
  }
}
static_assert(kHeadThreads == kPart, "a block has a part at a time");

struct Finished {
  float others[kWarps], weighted[kWarps], largest[kWarps], moved[kWarps];
  float e_at_target, total;
};

template <bool capped>
REDIT_DEVICE void finish(const HeadLaunch& a, Finished& shared) {
  const int64_t r = blockIdx.x;
  const HeadPart* parts = a.parts + r * a.part_count;
  const float target = a.rows[r].at_target;
  RowSums sums{0, 0};
  float largest = target, away = 0;
  for (int64_t p = threadIdx.x; p < a.part_count; p += kHeadThreads) {
    const HeadPart part = parts[p];
    sums.others += part.others, sums.weighted += part.weighted;
    largest = device::max_nan(largest, part.largest);
    if (part.anchor != target) away = 1;
  }
  largest = max_over<32>(largest);
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  away = block_sum(away, shared.moved);
  for (int w = 0; w < kWarps; ++w) largest = device::max_nan(largest, shared.largest[w]);
  float others = block_sum(sums.others, shared.others), weighted = block_sum(sums.weighted, shared.weighted);
  const bool repaired = (away > 0 || needs_repair(target, others)) && target == target;
  const float anchor = repaired ? largest : target;
  if (repaired) {
    sums = {0, 0};
    for (int64_t p = threadIdx.x; p < a.part_count; p += kHeadThreads) {
      const RowSums more = moved<capped>(parts[p], anchor, a.transform);
      sums.others += more.others, sums.weighted += more.weighted;
    }
    __syncthreads();
    others = block_sum(sums.others, shared.others), weighted = block_sum(sums.weighted, shared.weighted);
  }
  if (threadIdx.x == 0) {
    const Row row = redit::finish(anchor, target, {others, weighted}, a.transform);
    a.out.logp[r] = row.logp;
    if (a.out.entropy) a.out.entropy[r] = row.entropy;
    float* kept = static_cast<float*>(a.out.sums.data) + r;
    kept[0] = row.anchor, kept[a.out.sums.row_stride] = row.others, kept[2 * a.out.sums.row_stride] = row.total;
    shared.e_at_target = gradient_at_target(row, 1, 0, -1, a.transform);
    shared.total = row.total;
  }
  if (!a.e.data) return;
  __syncthreads();
  const bool keep = is_number(shared.total);
  if (repaired || !keep) rescale<capped>(a, r, anchor, keep);
  __syncthreads();
  const int64_t column = a.targets[r];
  if (threadIdx.x == 0 && keep && !stray(column, a.e.columns))
    set_element(a.e.data, r * a.e.row_stride + column * a.e.column_stride, a.e_type, shared.e_at_target);
}

}  // namespace

#define REDIT_HEAD(name, threads, ...)                                                                             \
  extern "C" __global__ void __launch_bounds__(threads) linear_loss_##name(const __grid_constant__ HeadLaunch a) { \
    __VA_ARGS__;                                                                                                   \
  }
REDIT_HEAD(anchor, kHeadThreads, anchor(a))
REDIT_HEAD(resume, kHeadThreads, resume(a))
REDIT_HEAD(tile, kMostTile / kPerThread, tile<true>(a))
REDIT_HEAD(tile_grad, kMostTile / kPerThread, tile<false>(a))

extern "C" __global__ void __launch_bounds__(kHeadThreads) linear_loss_finish(const __grid_constant__ HeadLaunch a) {
  __shared__ Finished shared;
  if (a.transform.capped)
    finish<true>(a, shared);
  else
    finish<false>(a, shared);
}

cuda::Kernels cuda::linear_loss_kernels() {
  return {REDIT_KERNEL(linear_loss_anchor), REDIT_KERNEL(linear_loss_resume), REDIT_KERNEL(linear_loss_tile),
          REDIT_KERNEL(linear_loss_tile_grad), REDIT_KERNEL(linear_loss_finish)};
}

}  // namespace redit
