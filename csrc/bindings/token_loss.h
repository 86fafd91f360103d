// The arguments of the token losses.
#pragma once

#include "bindings/tensors.h"

namespace redit {

inline Logits logits_of(const Tensors<2>& in) {
  const auto& [logits, targets] = in;
  const Dtype type = element_type("logits", logits);
  const int64_t rows = std::get<2>(logits), columns = std::get<3>(logits);
  if (columns < 1) throw std::invalid_argument("logits must have at least one column, got " + describe(logits));
  return {matrix("logits", logits, type, rows, columns), type, vector<const int64_t>("targets", targets, rows)};
}

// Of the type and shape of the logits; the logits themselves, or apart from them.
inline Matrix gradient_of(const Tensor& grad, const Logits& logits) {
  const Matrix& x = logits.matrix;
  const Matrix result = output("grad_logits", matrix("grad_logits", grad, logits.type, x.rows, x.columns));
  const bool same_strides = result.row_stride == x.row_stride && result.column_stride == x.column_stride;
  require(result.data != x.data || !x.data || same_strides,
          "grad_logits must have the strides of the logits that it overwrites");
  return result;
}

inline LossRows loss_rows(const Tensors<5>& in, const PolicyConstants& policy, int64_t rows) {
  const auto& [weights, advantages, old_logp, ref_logp, sampling_logp] = in;
  require_beside("ref_logp", ref_logp, "a beta other than 0", policy.beta != 0);
  require_beside("sampling_logp", sampling_logp, "a correction", policy.correction != TokenCorrection::none);
  return {vector<const float>("weights", weights, rows), vector<const float>("advantages", advantages, rows),
          vector_or_null<const float>("old_logp", old_logp, rows),
          vector_or_null<const float>("ref_logp", ref_logp, rows),
          vector_or_null<const float>("sampling_logp", sampling_logp, rows)};
}

// Rows of a token loss or of a chunk of the head.
inline RowResults row_results(const Tensors<3>& in, int64_t rows) {
  const auto& [logp, entropy, sums] = in;
  return {vector<float>("logp", logp, rows), vector_or_null<float>("entropy", entropy, rows),
          output("sums", dense("sums", sums, Dtype::float32, 3, rows))};
}

inline RowUpstream row_upstream(const Tensors<4>& in, int64_t rows) {
  const auto& [sums, grad_logp, grad_entropy, entropy] = in;
  require_beside("entropy", entropy, "grad_entropy", given(grad_entropy));
  return {dense("sums", sums, Dtype::float32, 3, rows), vector<const float>("grad_logp", grad_logp, rows),
          vector_or_null<const float>("grad_entropy", grad_entropy, rows),
          vector_or_null<const float>("entropy", entropy, rows)};
}

inline TokenLogp token_logp_of(const Tensors<3>& outputs, const Tensors<2>& logits) {
  const Logits in = logits_of(logits);
  return {row_results(outputs, in.matrix.rows), in};
}

inline TokenLogpGrad token_logp_grad_of(const Tensor& grad, const Tensors<2>& logits, const Tensors<4>& upstream) {
  const Logits in = logits_of(logits);
  return {gradient_of(grad, in), in, row_upstream(upstream, in.matrix.rows)};
}

inline TokenLoss token_loss_of(const Tensors<4>& outputs, const Tensors<2>& logits, const Tensors<5>& rows,
                               pybind11::handle policy, const Tensor& grad_scale) {
  const auto& [loss, logp, entropy, grad] = outputs;
  const Logits in = logits_of(logits);
  const int64_t count = in.matrix.rows;
  const auto constants = filled<PolicyConstants>("policy", policy);
  return {vector<float>("loss", loss, 1),
          vector<float>("logp", logp, count),
          vector<float>("entropy", entropy, count),
          given(grad) ? gradient_of(grad, in) : Matrix{},
          in,
          loss_rows(rows, constants, count),
          constants,
          vector_or_null<const float>("grad_scale", grad_scale, 1)};
}

}  // namespace redit
