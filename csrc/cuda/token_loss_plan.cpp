// The launches of the token losses; token_loss.cu and token_loss_cluster.cu say which there are.

#include "cuda/token_loss.h"

#include <algorithm>
#include <string>

namespace redit {

using cuda::Device, cuda::launch_of, cuda::Launches;

namespace {

constexpr int kWarpSums = 128;  // bytes of a slice's

int64_t quotient_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t wide(Dtype type) { return 16 / size_of(type); }

Slices slices_of(const Matrix& logits, Dtype type) {
  const int64_t vectors = quotient_up(logits.columns, wide(type));
  const int64_t granules = quotient_up(logits.columns + wide(type) - 1, wide(type));  // that a row may touch
  int64_t count = 1;
  while (count < kMostPeers && quotient_up(granules, count) > kSliceGranules) count *= 2;
  if (quotient_up(granules, count) > kSliceGranules)
    count = std::min<int64_t>(kMostSlices, quotient_up(vectors, kSliceGranules));
  const int threads = granules <= kFewGranules ? kFewThreads : kRowThreads;
  return {int(count), int(quotient_up(vectors, count)), threads};
}

std::string name_of(const char* kind, Dtype type, bool capped) {
  const char* types[] = {"float32", "bfloat16", "float16"};
  return std::string("token_loss_") + kind + "_" + types[int(type)] + (capped ? "_capped" : "");
}

// At most a block of 512 threads, or four of 128, a multiprocessor, so that the L2 cache has their rows.
template <class Params>
cuda::Launch over_rows(const char* kind, const Params& a, const Device& device) {
  const Logits& logits = a.op.logits;
  const int64_t most = int64_t(device.multiprocessors) * (kRowThreads / a.slices.threads);
  return launch_of(name_of(kind, logits.type, a.transform.capped).c_str(), std::min(logits.matrix.rows, most),
                   a.slices.threads, 1, a.slices.count * kWarpSums, a);
}

int spans_of(const Matrix& x, Dtype type) {
  return int(std::max<int64_t>(1, quotient_up(quotient_up(x.columns, wide(type)), kSpanVectors)));
}

template <class Params>
cuda::Launch over_spans(const std::string& kernel, const Matrix& x, const Params& a, const Device& device) {
  const int64_t most = int64_t(device.multiprocessors) * 3;
  return launch_of(kernel.c_str(), std::min(x.rows * a.spans, most), kSpanThreads, 1, 0, a);
}

}  // namespace

Launches plan_token_loss(const TokenLoss& op, const TransformConstants& transform, float* row_losses,
                         const Device& device) {
  const Matrix& logits = op.logits.matrix;
  const TokenLossLaunch a{op, transform, slices_of(logits, op.logits.type), row_losses};
  Launches launches;
  if (logits.rows > 0) launches.push_back(over_rows("rows", a, device));
  launches.push_back(launch_of("token_loss_total", 1, kTotalThreads, 1, 0, a));
  return launches;
}

Launches plan_token_logp(const TokenLogp& op, const TransformConstants& transform, const Device& device) {
  const Matrix& logits = op.logits.matrix;
  if (logits.rows == 0) return {};
  const TokenLogpLaunch a{op, transform, slices_of(logits, op.logits.type)};
  return {over_rows("logp", a, device)};
}

Launches plan_token_logp_grad(const TokenLogpGrad& op, const TransformConstants& transform, const Device& device) {
  const Matrix& logits = op.logits.matrix;
  if (logits.rows == 0) return {};
  const TokenLogpGradLaunch a{op, transform, spans_of(logits, op.logits.type)};
  return {over_spans(name_of("grad", op.logits.type, transform.capped), logits, a, device)};
}

Launches plan_scale_in_place(const Matrix& x, Dtype type, const float* factor, const Device& device) {
  if (x.rows == 0 || x.columns == 0) return {};
  const ScaleLaunch a{x, factor, spans_of(x, type)};
  return {over_spans(name_of("scale", type, false), x, a, device)};
}

}  // namespace redit
