// Token log-probs and losses from logits (R, V); redit_fast/backends/reference/token_loss.py is the definition.
//
//   logp        logp, entropy, sums                                     reads 2 bytes a logit of 16 bits, 4 of 32
//   rows        the same, the row's loss, and its gradient where asked  reads 2 / 4 twice, the second time from the L2
//                                                                       cache, and writes 2 / 4
//   grad        g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx   reads and writes 2 / 4
//   scale       x *= factor; nothing where factor is 1                  reads and writes 2 / 4
//   total       the loss: the rows' losses in one order                 reads 4 bytes a row
//
// These run anywhere, on any strides; token_loss_cluster.cu reads once, with the same bits, where it can. A block has a
// row, or in grad and scale 32 KB of one. Masked rows are not read. Of a row that does not begin at a multiple of 16
// bytes the sums read 3 % more: a warp's last lane needs the granule after its own.
//
//   kernel     threads  shared bytes  registers: sm_80  sm_90a  sm_100
//   logp    128 or 512   128 a slice              80      78      95
//   rows    128 or 512   128 a slice              94      94     124
//   grad           256             0              78      80      77
//   scale          256             0              64      72      80
//   total         1024             0              32      32      32

#include "cuda/token_rows.h"

namespace redit {

namespace {

constexpr int kFlight = 2;  // vectors that a thread asks for at once: 16 KB a block of 512; 4 spill on sm_100

// A row, or what follows one of its columns, as vectors.
template <class Type>
struct Source {
  using Stored = typename Type::Stored;
  const Stored* first;
  int64_t stride;
  int count;                 // elements
  uint32_t shift;            // bytes from a multiple of 16 to the first element
  int whole_from, whole_to;  // granules that the row fills
  uint64_t policy;

  REDIT_DEVICE Source(const Stored* x, int64_t column_stride, int elements, uint64_t l2)
      : first(x), stride(column_stride), count(elements), policy(l2) {
    const bool dense = stride == 1 || count == 1;
    shift = dense ? uint32_t(reinterpret_cast<uintptr_t>(x) % 16) : 0;
    whole_from = shift ? 1 : 0;
    whole_to = dense ? int((int64_t(count) * sizeof(Stored) + shift) / 16) : 0;
  }
  REDIT_DEVICE Stored stored(int i) const { return first[i * stride]; }

  REDIT_DEVICE Vector whole(int u) const {
    return device::load16(reinterpret_cast<const char*>(first) + (int64_t(u) * 16 - shift), policy);
  }
  // Vector v from its elements; what is beyond the row is 0.
  REDIT_DEVICE Vector gathered(int v) const {
    Vector x{};
#pragma unroll
    for (int i = 0; i < Type::kWide; ++i)
      if (v * Type::kWide + i < count) {
        const uint32_t bits = stored(v * Type::kWide + i);
        x.word[i * sizeof(Stored) / 4] |= bits << 8 * (i * sizeof(Stored) % 4);
      }
    return x;
  }
};

// visit(x, v) for the block's vectors of [from, to), each thread's in rising order; a warp's are side by side.
template <class Type, class Visit>
REDIT_DEVICE void for_vectors(const Source<Type>& in, int from, int to, const Visit& visit) {
  const int lane = int(threadIdx.x) % 32, threads = int(blockDim.x);
  const int last = (to < in.whole_to ? to : in.whole_to) - 32 - (in.shift ? 1 : 0);  // of a warp's whole loads
  for (int base = from + int(threadIdx.x) - lane; base < to;) {
    if (base < in.whole_from || base > last) {  // the row's ends, and strided rows
      const int v = base + lane;
      if (v < to) visit(in.shift == 0 && v < in.whole_to ? in.whole(v) : in.gathered(v), v);
      base += threads;
      continue;
    }
    const int room = last - base;
    Vector x[kFlight], next[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (k * threads <= room) {
        x[k] = in.whole(base + k * threads + lane);
        if (in.shift && lane == 31) next[k] = in.whole(base + k * threads + 32);
      }
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (k * threads <= room) {
        if (in.shift) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t after = __shfl_down_sync(~0u, x[k].word[i], 1);
            if (lane != 31) next[k].word[i] = after;
          }
          x[k] = joined<Type>(x[k], next[k], in.shift);
        }
        visit(x[k], base + lane);
        base += threads;
      }
  }
}

// A row of an output: the columns before the first multiple of 16 bytes, whole vectors, and what remains.
template <class Type>
struct Output {
  using Stored = typename Type::Stored;
  Stored* first;
  int64_t stride;
  int count, head, vectors;
  bool dense;

  REDIT_DEVICE Output(Stored* x, int64_t column_stride, int elements)
      : first(x), stride(column_stride), count(elements), dense(column_stride == 1 || elements == 1) {
    const int before = int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(Stored));
    head = !dense ? 0 : before < count ? before : count;
    vectors = dense ? (count - head) / Type::kWide : (count + Type::kWide - 1) / Type::kWide;
  }
  REDIT_DEVICE void put(const float (&x)[Type::kWide], int v) const {
    if (dense) return device::store16(first + head + int64_t(v) * Type::kWide, packed<Type>(x));
#pragma unroll
    for (int i = 0; i < Type::kWide; ++i)
      if (v * Type::kWide + i < count) first[(v * Type::kWide + i) * stride] = Type::narrow(x[i]);
  }
};

// Of a row of `out` vectors [from, to); with the first ones come the columns before them, with the last those behind.
template <class Type>
struct Span {
  int from, to;
  bool first, last;

  REDIT_DEVICE explicit Span(const Output<Type>& out) : from(0), to(out.vectors), first(true), last(true) {}
  REDIT_DEVICE Span(const Output<Type>& out, int index, int count) : first(index == 0), last(index == count - 1) {
    from = index * kSpanVectors < out.vectors ? index * kSpanVectors : out.vectors;
    to = out.vectors - from < kSpanVectors ? out.vectors : from + kSpanVectors;
  }
  REDIT_DEVICE bool has(const Output<Type>& out, int column) const {
    return column >= (first ? 0 : out.head + from * Type::kWide) &&
           column < (last ? out.count : out.head + to * Type::kWide);
  }
};

// out[j] = f(x[j]); column `target`, where it is one, becomes at_target. x is not read where there is none.
template <class Type, class F>
REDIT_DEVICE void write_span(const Output<Type>& out, const Span<Type>& span, const typename Type::Stored* x,
                             int64_t stride, int target, float at_target, const F& f) {
  constexpr int kWide = Type::kWide;
  const int t = int(threadIdx.x), body = out.head + out.vectors * kWide;
  const auto element = [&](int column) {
    const float value = column == target ? at_target : f(x ? Type::widen(x[column * stride]) : 0.0f);
    out.first[column * out.stride] = Type::narrow(value);
  };
  if (span.first && t < out.head) element(t);
  if (span.last && body + t < out.count) element(body + t);
  const auto vector = [&](const Vector& in, int v) {
    float value[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) value[i] = f(Type::at(in, i));
    const int at = target - (out.head + v * kWide);
    if (at >= 0 && at < kWide) {
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        if (i == at) value[i] = at_target;
    }
    out.put(value, v);
  };
  if (x) {
    const Source<Type> in(x + out.head * stride, stride, out.count - out.head, device::drop_policy());
    for_vectors(in, span.from, span.to, vector);
  } else {
    for (int v = span.from + t; v < span.to; v += int(blockDim.x)) vector(Vector{}, v);
  }
}

template <class Type>
REDIT_DEVICE void clear_span(const Output<Type>& out, const Span<Type>& span) {
  write_span(out, span, static_cast<const typename Type::Stored*>(nullptr), 1, kStray, 0, [](float) { return 0.0f; });
}

// e (constant + by_gap y) dz/dx
template <bool capped>
struct Gradient {
  Gap<capped> gap;
  Slopes slopes;
  REDIT_DEVICE float operator()(float x) const {
    const float u = squash<capped>(x, gap.t), y = gap(u);
    float e = device::exp2_approx(y);
    if (capped) e *= bend(u);
    return e * fmaf(y, slopes.by_gap, slopes.constant);
  }
};

// A block a row: its sums, one warp's end of it, and its gradient from a second reading.
template <class Type, bool capped, class Launch>
REDIT_DEVICE void block_rows(const Launch& a) {
  using Stored = typename Type::Stored;
  constexpr bool kLoss = std::is_same_v<Launch, TokenLossLaunch>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RowEnd shared_end;
  __shared__ RowBegin shared_begins[2];  // by turn
  __shared__ int shared_targets[2];
  auto* slices = reinterpret_cast<WarpSums*>(memory);
  const Matrix& logits = a.op.logits.matrix;
  const int vocabulary = int(logits.columns), vectors = (vocabulary + Type::kWide - 1) / Type::kWide;
  const int t = int(threadIdx.x), warps = int(blockDim.x) / 32;
  bool gradient = false;
  if constexpr (kLoss) gradient = a.op.grad.data;
  const uint64_t policy = gradient ? device::keep_policy() : device::drop_policy();

  int turn = 0;
  for (int64_t row = blockIdx.x; row < logits.rows; row += gridDim.x, turn ^= 1) {
    const Stored* x = row_of<const Stored>(logits, row);
    RowBegin& begin = shared_begins[turn];
    if (t == 0) {
      const int target = column_of(a.op.logits.targets[row], vocabulary);
      shared_targets[turn] = target;
      begin.at_target = target >= 0 ? Type::widen(x[target * logits.column_stride]) : kNaN;
    } else if (t <= 6) {
      begin.numbers[t - 1] = row_number(a, row, t - 1);
    }
    __syncthreads();
    const int target = shared_targets[turn];
    const float at_target = begin.at_target;
    RowEnd end{0, 0, 0, false, true};
    if (target == kMasked) {
      if (t == 0) finish_masked(a, row);
    } else {
      const Source<Type> in(x, logits.column_stride, vocabulary, policy);
      float anchor = at_target;
      for (bool repaired = false;; repaired = true) {
        const Gap<capped> gap(anchor, a.transform);
        for (int s = 0; s < a.slices.count; ++s) {
          const int from = s * a.slices.vectors, rest = vectors - from;
          RowSums sums{};
          for_vectors(in, from, rest < a.slices.vectors ? vectors : from + a.slices.vectors,
                      [&](const Vector& vector, int v) {
                        float e[Type::kWide];
                        const Vector counting = counted<Type>(vector, v, target, vocabulary);
                        add<Type, capped>(sums, e, counting, v, target, vocabulary, gap);
                      });
          sums = warp_sum(sums);
          slices[s].put(sums.others, sums.weighted);
        }
        __syncthreads();
        if (t < 32) {
          double total = 0;
          for (int s = 0; s < a.slices.count; ++s) total += slices[s].total(warps);
          const double other = __shfl_xor_sync(~0u, total, 16);
          const RowSums sums{float(t < 16 ? total : other), float(t < 16 ? other : total)};
          const RowEnd found = finish_or_repair(a, row, repaired, anchor, at_target, sums, begin.numbers, t == 0);
          if (t == 0) shared_end = found;
        }
        __syncthreads();
        end = shared_end;
        if (!end.again) break;
        float top = at_target;
        for_vectors(in, 0, vectors, [&](const Vector& vector, int v) {
          top = largest<Type>(top, counted<Type>(vector, v, target, vocabulary));
        });
        slices[0].put(warp_largest(top), 0);
        __syncthreads();
        anchor = slices[0].largest(warps);
        __syncthreads();
      }
      end.anchor = anchor;
    }
    if constexpr (kLoss) {
      if (gradient) {
        const Output<Type> out(row_of<Stored>(a.op.grad, row), a.op.grad.column_stride, vocabulary);
        const Span<Type> all(out);
        if (end.zero)
          clear_span(out, all);
        else
          write_span(out, all, x, logits.column_stride, target, end.at_target,
                     Gradient<capped>{{end.anchor, a.transform}, {end.constant, 0}});
      }
    }
  }
}

// A block a span of a row's gradient.
template <class Type, bool capped>
REDIT_DEVICE void grad_spans(const TokenLogpGradLaunch& a) {
  using Stored = typename Type::Stored;
  struct Numbers {
    int target;
    float anchor, at_target;
    Slopes slopes;
    bool zero;
  };
  __shared__ Numbers shared_numbers;
  const Matrix& logits = a.op.logits.matrix;
  const RowUpstream& up = a.op.upstream;
  const int vocabulary = int(logits.columns);
  for (int64_t item = blockIdx.x; item < logits.rows * a.spans; item += gridDim.x) {
    const int64_t row = item / a.spans;
    const Stored* x = row_of<const Stored>(logits, row);
    const Output<Type> out(row_of<Stored>(a.op.grad, row), a.op.grad.column_stride, vocabulary);
    const Span<Type> span(out, int(item % a.spans), a.spans);
    if (threadIdx.x == 0) {
      const int target = column_of(a.op.logits.targets[row], vocabulary);
      Numbers n{target, 0, 0, {0, 0}, true};
      if (target != kMasked) {
        const float* sums = static_cast<const float*>(up.sums.data) + row;
        const float g = up.grad_logp[row], h = up.grad_entropy ? up.grad_entropy[row] : 0;
        const bool here = target >= 0 && span.has(out, target);  // else another block may have written over it
        const Row end{sums[0],
                      sums[up.sums.row_stride],
                      sums[2 * up.sums.row_stride],
                      here ? Type::widen(x[target * logits.column_stride]) : 0,
                      0,
                      up.grad_entropy ? up.entropy[row] : 0};
        const double factor = 1 / double(end.total);
        n = {target, end.anchor, here ? gradient_at_target(end, g, h, factor, a.transform) : 0,
             slopes_of(end, g, h, factor, a.transform), g == 0 && h == 0 && std::isfinite(end.total)};
      }
      shared_numbers = n;
    }
    __syncthreads();
    const Numbers n = shared_numbers;
    if (n.zero)
      clear_span(out, span);
    else
      write_span(out, span, x, logits.column_stride, n.target, n.at_target,
                 Gradient<capped>{{n.anchor, a.transform}, n.slopes});
    __syncthreads();
  }
}

template <class Type>
REDIT_DEVICE void scale_spans(const ScaleLaunch& a) {
  using Stored = typename Type::Stored;
  const float factor = *a.factor;
  if (factor == 1) return;
  for (int64_t item = blockIdx.x; item < a.x.rows * a.spans; item += gridDim.x) {
    Stored* x = row_of<Stored>(a.x, item / a.spans);
    const Output<Type> out(x, a.x.column_stride, int(a.x.columns));
    const Span<Type> span(out, int(item % a.spans), a.spans);
    write_span(out, span, x, a.x.column_stride, kStray, 0.0f, [&](float value) { return value * factor; });
  }
}

}  // namespace

#define REDIT_ROWS(type, Type, name, capped)                                  \
  extern "C" __global__ void __launch_bounds__(kRowThreads, 1)                \
      token_loss_rows_##name(const __grid_constant__ TokenLossLaunch a) {     \
    block_rows<Type, capped>(a);                                              \
  }                                                                           \
  extern "C" __global__ void __launch_bounds__(kRowThreads, 1)                \
      token_loss_logp_##name(const __grid_constant__ TokenLogpLaunch a) {     \
    block_rows<Type, capped>(a);                                              \
  }                                                                           \
  extern "C" __global__ void __launch_bounds__(kSpanThreads, 3)               \
      token_loss_grad_##name(const __grid_constant__ TokenLogpGradLaunch a) { \
    grad_spans<Type, capped>(a);                                              \
  }
#define REDIT_TYPE(type, Type)                                         \
  REDIT_ROWS(type, Type, type, false)                                  \
  REDIT_ROWS(type, Type, type##_capped, true)                          \
  extern "C" __global__ void __launch_bounds__(kSpanThreads, 3)        \
      token_loss_scale_##type(const __grid_constant__ ScaleLaunch a) { \
    scale_spans<Type>(a);                                              \
  }
REDIT_TYPE(float32, Float32)
REDIT_TYPE(bfloat16, BFloat16)
REDIT_TYPE(float16, Float16)

// In 1024 lanes of float64, then the lanes in pairs.
extern "C" __global__ void __launch_bounds__(kTotalThreads)
    token_loss_total(const __grid_constant__ TokenLossLaunch a) {
  __shared__ double lanes[kTotalThreads];
  const int t = int(threadIdx.x);
  double sum = 0;
  for (int64_t row = t; row < a.op.logits.matrix.rows; row += kTotalThreads) sum += a.row_losses[row];
  lanes[t] = sum;
  for (int half = kTotalThreads / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) lanes[t] += lanes[t + half];
  }
  if (t == 0) *a.op.loss = float(lanes[0]);
}

#define REDIT_ROWS_LIST(name) \
  REDIT_KERNEL(token_loss_rows_##name), REDIT_KERNEL(token_loss_logp_##name), REDIT_KERNEL(token_loss_grad_##name)
#define REDIT_TYPE_LIST(type) \
  REDIT_ROWS_LIST(type), REDIT_ROWS_LIST(type##_capped), REDIT_KERNEL(token_loss_scale_##type)
cuda::Kernels cuda::token_loss_kernels() {
  return {REDIT_TYPE_LIST(float32), REDIT_TYPE_LIST(bfloat16), REDIT_TYPE_LIST(float16),
          REDIT_KERNEL(token_loss_total)};
}

}  // namespace redit
