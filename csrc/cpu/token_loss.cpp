// Token log-probs and losses; redit_fast/backends/reference/token_loss.py is the definition.
//
// Memory: forward reads every logit once; with gradient a row (128 KB at V = 32000) is read again from the L2 cache,
// right after its sums, and written once. Rows are independent: the bits do not depend on the number of threads.

#include "token_loss.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "shared/policy_loss.h"

namespace redit {
namespace {

// The entropy is that of the row `with_entropy`, else meaningless.
Row forward(const void* x, int64_t vocabulary, int64_t target, bool with_entropy, const Run& run) {
  if (stray(target, vocabulary)) return {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
  const RowKernels& kernel = row_kernels(run);
  const float at_target = kernel.read(x, target);
  float anchor = at_target;
  RowSums sums = kernel.sums(x, vocabulary, target, anchor, with_entropy, run.transform);
  if (needs_repair(anchor, sums.others)) {
    anchor = kernel.largest(x, vocabulary);
    sums = kernel.sums(x, vocabulary, target, anchor, with_entropy, run.transform);
  }
  return finish(anchor, at_target, sums, run.transform);
}

// The row of the gradient for the upstream gradients g of logp and h of the entropy.
void backward(const Matrix& grad, int64_t row, const void* x, int64_t target, const Row& in, float g, float h,
              const Run& run, void* scratch) {
  char* out = row_of(grad, row, run);
  void* dense = grad.column_stride == 1 ? out : scratch;
  if (g == 0 && h == 0 && std::isfinite(in.total)) {
    std::fill_n(static_cast<char*>(dense), grad.columns * size_of(run.type), char(0));
  } else {
    const bool missing = stray(target, grad.columns);
    const double factor = 1 / double(in.total);
    const float at_target = missing ? 0 : gradient_at_target(in, g, h, factor, run.transform);
    row_kernels(run).gradient(dense, x, grad.columns, missing ? -1 : target, at_target, in.anchor,
                              slopes_of(in, g, h, factor, run.transform), run.transform);
  }
  if (dense != out) copy_row(run.type, out, grad.column_stride, dense, 1, grad.columns);
}

void clear(const Matrix& grad, int64_t row, const Run& run, void* scratch) {
  backward(grad, row, nullptr, 0, Row{}, 0, 0, run, scratch);
}

int64_t scratch_elements(const Matrix& logits, const Matrix& grad) {
  return logits.column_stride == 1 && (!grad.data || grad.column_stride == 1) ? 0 : logits.columns;
}

}  // namespace

void token_logp(const TokenLogp& args, const Run& run) {
  const RowResults& out = args.out;
  const Matrix& logits = args.logits.matrix;
  const int64_t* targets = args.logits.targets;
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, {}), run, [&](int64_t r, void* scratch) {
    Row row{};
    if (targets[r] != kIgnore)
      row = forward(contiguous_row(logits, r, run, scratch), logits.columns, targets[r], out.entropy, run);
    store_row(out, r, row);
  });
}

void token_logp_grad(const TokenLogpGrad& args, const Run& run) {
  const Matrix &grad = args.grad, &logits = args.logits.matrix;
  const RowUpstream& upstream = args.upstream;
  const int64_t* targets = args.logits.targets;
  if (grad.data != logits.data) advise_huge_pages(grad, run);
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, grad), run, [&](int64_t r, void* scratch) {
    if (targets[r] == kIgnore) return clear(grad, r, run, scratch);
    Row row = kept_row(upstream, r);
    const void* x = contiguous_row(logits, r, run, scratch);
    if (!stray(targets[r], logits.columns)) row.target = row_kernels(run).read(x, targets[r]);
    const float h = upstream.grad_entropy ? upstream.grad_entropy[r] : 0;
    backward(grad, r, x, targets[r], row, upstream.grad_logp[r], h, run, scratch);
  });
}

void token_loss(const TokenLoss& args, const Run& run) {
  const Matrix &grad = args.grad, &logits = args.logits.matrix;
  const LossRows& rows = args.rows;
  const int64_t* targets = args.logits.targets;
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1;
  if (grad.data && grad.data != logits.data) advise_huge_pages(grad, run);
  std::vector<float> row_losses(size_t(logits.rows));
  for_each_row(logits.rows, logits.columns, scratch_elements(logits, grad), run, [&](int64_t r, void* scratch) {
    if (targets[r] == kIgnore) {
      args.logp[r] = args.entropy[r] = 0;
      if (grad.data) clear(grad, r, run, scratch);
      return;
    }
    const void* x = contiguous_row(logits, r, run, scratch);
    const Row row = forward(x, logits.columns, targets[r], true, run);
    args.logp[r] = row.logp;
    args.entropy[r] = row.entropy;
    const float old_logp = rows.old_logp ? rows.old_logp[r] : row.logp, ref_logp = rows.ref_logp ? rows.ref_logp[r] : 0;
    const float sampling_logp = rows.sampling_logp ? rows.sampling_logp[r] : 0, weight = rows.weights[r];
    const LossSlope token =
        token_coefficient(args.policy, row.logp, rows.advantages[r], old_logp, ref_logp, sampling_logp);
    row_losses[r] = weight * token.loss;
    if (grad.data) backward(grad, r, x, targets[r], row, weight * token.slope * grad_scale, 0, run, scratch);
  });
  double sum = 0;
  for (float row_loss : row_losses) sum += double(row_loss);
  *args.loss = float(sum);
}

void scale_in_place(const Matrix& x, float factor, const Run& run) {
  if (factor == 1) return;
  constexpr int64_t kSpan = 32768;
  const int64_t spans = (x.columns + kSpan - 1) / kSpan, width = std::min(x.columns, kSpan);
  const int64_t scratch_size = x.column_stride == 1 ? 0 : width;
  for_each_row(x.rows * spans, width, scratch_size, run, [&](int64_t index, void* scratch) {
    const int64_t first = index % spans * kSpan, count = std::min(kSpan, x.columns - first);
    char* span = row_of(x, index / spans, run) + first * x.column_stride * size_of(run.type);
    if (x.column_stride == 1) return row_kernels(run).scale(span, count, factor);
    copy_row(run.type, scratch, 1, span, x.column_stride, count);
    row_kernels(run).scale(scratch, count, factor);
    copy_row(run.type, span, x.column_stride, scratch, 1, count);
  });
}

}  // namespace redit
