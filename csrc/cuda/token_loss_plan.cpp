// The launches of the token losses; token_loss.cu and token_loss_cluster.cu say which there are.

#include "cuda/token_loss.h"

#include <algorithm>
#include <string>

namespace redit {

using cuda::Device, cuda::Launch, cuda::launch_of, cuda::Launches;

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

std::string name_of(const std::string& kind, Dtype type, bool capped) {
  const char* types[] = {"float32", "bfloat16", "float16"};
  return "token_loss_" + kind + "_" + types[int(type)] + (capped ? "_capped" : "");
}

// A block a row. At most a block of 512 threads, or four of 128, a multiprocessor, so that the L2 cache has their rows.
template <class Params>
Launch block_rows(const char* kind, const Params& a, const Device& device) {
  const Logits& logits = a.op.logits;
  const int64_t most = int64_t(device.multiprocessors) * (kRowThreads / a.slices.threads);
  return launch_of(name_of(kind, logits.type, a.transform.capped).c_str(), std::min(logits.matrix.rows, most),
                   a.slices.threads, 1, a.slices.count * kWarpSums, a);
}

bool dense(const Matrix& x) { return x.column_stride == 1 || x.columns == 1; }

// Whether every row of x and of y has the same remainder mod 16 bytes.
bool aligned_alike(const Matrix& x, const Matrix& y, Dtype type) {
  const auto address = [](const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data); };
  return (address(x) - address(y)) % 16 == 0 && (x.rows < 2 || (x.row_stride - y.row_stride) * size_of(type) % 16 == 0);
}

// A cluster a row, where its slices fit into the shared memory of the device's blocks; else nothing.
template <class Params>
Launches cluster_rows(const Params& a, const std::string& vectors, const Device& device) {
  const Logits& logits = a.op.logits;
  const int count = a.slices.count, threads = a.slices.threads;
  if (!dense(logits.matrix) || count > kMostPeers || device.architecture < 90) return {};
  const int shared = kClusterHeader + kStages * 16 * (a.slices.vectors + 1);
  const std::string kind = "cluster_" + std::to_string(threads) + vectors;
  Launch launch = launch_of(name_of(kind, logits.type, a.transform.capped).c_str(), count, threads, count, shared, a);
  launch.blocks = std::min<int64_t>(logits.matrix.rows, cuda::resident_clusters(device, launch)) * count;
  if (launch.blocks == 0) return {};
  return {launch};
}

// Vectors of a thread that the kernel keeps: 4, 6, 8 or 10, and always 10 of 128 threads.
std::string vectors_of(const Slices& slices) {
  int vectors = slices.threads == kFewThreads ? 10 : 4;
  while (vectors * slices.threads < slices.vectors) vectors += 2;
  return "x" + std::to_string(vectors);
}

int spans_of(const Matrix& x, Dtype type) {
  return int(std::max<int64_t>(1, quotient_up(quotient_up(x.columns, wide(type)), kSpanVectors)));
}

template <class Params>
Launch over_spans(const std::string& kernel, const Matrix& x, const Params& a, const Device& device) {
  const int64_t most = int64_t(device.multiprocessors) * 3;
  return launch_of(kernel.c_str(), std::min(x.rows * a.spans, most), kSpanThreads, 1, 0, a);
}

}  // namespace

Launches plan_token_loss(const TokenLoss& op, const TransformConstants& transform, float* row_losses,
                         const Device& device) {
  const Matrix& logits = op.logits.matrix;
  const TokenLossLaunch a{op, transform, slices_of(logits, op.logits.type), row_losses};
  Launches launches;
  if (logits.rows > 0 && op.grad.data && dense(op.grad) && aligned_alike(logits, op.grad, op.logits.type))
    launches = cluster_rows(a, vectors_of(a.slices), device);
  if (logits.rows > 0 && launches.empty()) launches = {block_rows("rows", a, device)};
  launches.push_back(launch_of("token_loss_total", 1, kTotalThreads, 1, 0, a));
  return launches;
}

Launches plan_token_logp(const TokenLogp& op, const TransformConstants& transform, const Device& device) {
  const Matrix& logits = op.logits.matrix;
  if (logits.rows == 0) return {};
  const TokenLogpLaunch a{op, transform, slices_of(logits, op.logits.type)};
  const Launches cluster = cluster_rows(a, "_logp", device);
  return cluster.empty() ? Launches{block_rows("logp", a, device)} : cluster;
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
