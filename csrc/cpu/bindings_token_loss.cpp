// The token-loss functions of redit_fast._cpu; see bindings_cpu.cpp.

#include "bindings.h"
#include "token_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

Logits logits_of(const Tensors<2>& in) {
  const auto& [logits, targets] = in;
  const Dtype type = element_type("logits", logits);
  const int64_t rows = std::get<2>(logits), columns = std::get<3>(logits);
  if (columns < 1) throw std::invalid_argument("logits must have at least one column, got " + describe(logits));
  return {matrix("logits", logits, type, rows, columns), type, vector<const int64_t>("targets", targets, rows)};
}

// Of the type and shape of the logits; the logits themselves, or apart from them.
Matrix gradient_of(const Tensor& grad, const Logits& logits) {
  const Matrix& x = logits.matrix;
  const Matrix result = output("grad_logits", matrix("grad_logits", grad, logits.type, x.rows, x.columns));
  const bool same_strides = result.row_stride == x.row_stride && result.column_stride == x.column_stride;
  require(result.data != x.data || !x.data || same_strides,
          "grad_logits must have the strides of the logits that it overwrites");
  return result;
}

LossRows loss_rows(const Tensors<5>& in, const PolicyConstants& policy, int64_t rows) {
  const auto& [weights, advantages, old_logp, ref_logp, sampling_logp] = in;
  require_beside("ref_logp", ref_logp, "a beta other than 0", policy.beta != 0);
  require_beside("sampling_logp", sampling_logp, "a correction", policy.correction != TokenCorrection::none);
  return {vector<const float>("weights", weights, rows), vector<const float>("advantages", advantages, rows),
          vector_or_null<const float>("old_logp", old_logp, rows),
          vector_or_null<const float>("ref_logp", ref_logp, rows),
          vector_or_null<const float>("sampling_logp", sampling_logp, rows)};
}

void call_token_logp(const Tensors<3>& outputs, const Tensors<2>& logits, py::handle transform, py::handle processor) {
  const Logits in = logits_of(logits);
  const TokenLogp args{row_results(outputs, in.matrix.rows), in};
  const Run run = run_of(in.type, transform, processor);
  py::gil_scoped_release release;
  token_logp(args, run);
}

void call_token_logp_grad(const Tensor& grad, const Tensors<2>& logits, const Tensors<4>& upstream,
                          py::handle transform, py::handle processor) {
  const Logits in = logits_of(logits);
  const TokenLogpGrad args{gradient_of(grad, in), in, row_upstream(upstream, in.matrix.rows)};
  const Run run = run_of(in.type, transform, processor);
  py::gil_scoped_release release;
  token_logp_grad(args, run);
}

void call_token_loss(const Tensors<4>& outputs, const Tensors<2>& logits, const Tensors<5>& rows, py::handle policy,
                     float grad_scale, py::handle transform, py::handle processor) {
  const auto& [loss, logp, entropy, grad] = outputs;
  const Logits in = logits_of(logits);
  const int64_t count = in.matrix.rows;
  const auto constants = filled<PolicyConstants>("policy", policy);
  const TokenLoss args{vector<float>("loss", loss, 1),
                       vector<float>("logp", logp, count),
                       vector<float>("entropy", entropy, count),
                       given(grad) ? gradient_of(grad, in) : Matrix{},
                       in,
                       loss_rows(rows, constants, count),
                       constants,
                       grad_scale};
  const Run run = run_of(in.type, transform, processor);
  py::gil_scoped_release release;
  token_loss(args, run);
}

void call_scale_in_place(const Tensor& x, float factor, py::handle processor) {
  const Dtype type = element_type("x", x);
  const Matrix all = output("x", matrix("x", x, type, std::get<2>(x), std::get<3>(x)));
  const auto [threads, level] = processor_of(processor);
  const Run run{type, {}, threads, level};
  py::gil_scoped_release release;
  scale_in_place(all, factor, run);
}

}  // namespace

void bind_token_loss(py::module_& module) {
  module.def("best_level", &best_level);
  module.def("token_logp", &call_token_logp);
  module.def("token_logp_grad", &call_token_logp_grad);
  module.def("token_loss", &call_token_loss);
  module.def("scale_in_place", &call_scale_in_place);
}

}  // namespace redit
