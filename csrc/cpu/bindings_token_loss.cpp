// The token-loss functions of redit_fast._cpu; see bindings_cpu.cpp.

#include "bindings.h"
#include "token_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

using Policy = std::tuple<int, int, int, bool, float, float, float, float, float, float, float, float, float, float>;

PolicyLoss policy_loss(const Policy& in) {
  const auto& [form, kl, correction, corrected, low, high, delta, dual, positive, negative, dro, beta, floor, cap] = in;
  require(form >= 0 && form <= int(LossForm::dro), "policy has no loss form " + std::to_string(form));
  require(kl >= 0 && kl <= int(Kl::abs), "policy has no KL estimator " + std::to_string(kl));
  require(correction >= 0 && correction <= int(Correction::mask),
          "policy has no correction " + std::to_string(correction));
  return {LossForm(form), Kl(kl), Correction(correction), corrected, low, high, delta, dual,
          positive, negative, dro, beta, floor, cap};
}

struct Logits {
  Matrix matrix;
  ElementType type;
  const int64_t* targets;
};

Logits logits_of(const Tensor& logits, const Tensor& targets) {
  const ElementType type = element_type("logits", logits);
  const int64_t rows = std::get<2>(logits);
  require(std::get<3>(logits) >= 1, "logits must have at least one column, got " + describe(logits));
  return {matrix("logits", logits, dtype(type), rows, std::get<3>(logits)), type,
          vector<const int64_t>("targets", targets, rows)};
}

// Of the type and shape of the logits; the logits themselves, or apart from them.
Matrix gradient_of(const Tensor& grad, const Logits& logits) {
  const Matrix& x = logits.matrix;
  const Matrix result = output("grad_logits", matrix("grad_logits", grad, dtype(logits.type), x.rows, x.columns));
  const bool same_strides = result.row_stride == x.row_stride && result.column_stride == x.column_stride;
  require(result.data != x.data || !x.data || same_strides,
          "grad_logits must have the strides of the logits that it overwrites");
  return result;
}

void call_token_logp(const Tensor& logp, const Tensor& entropy, const Tensor& sums, const Tensor& logits,
                     const Tensor& targets, const Setting& setting) {
  const Logits in = logits_of(logits, targets);
  const int64_t rows = in.matrix.rows;
  const Matrix kept = output("sums", dense("sums", sums, Dtype::float32, 3, rows));
  const TokenForward out{vector<float>("logp", logp, rows), vector_or_null<float>("entropy", entropy, rows),
                         static_cast<float*>(kept.data), kept.row_stride};
  const Run how = run(in.type, setting);
  py::gil_scoped_release release;
  token_logp(out, in.matrix, in.targets, how);
}

void call_token_logp_grad(const Tensor& grad_logits, const Tensor& logits, const Tensor& targets, const Tensor& sums,
                          const Tensor& grad_logp, const Tensor& grad_entropy, const Tensor& entropy,
                          const Setting& setting) {
  require_beside("entropy", entropy, "grad_entropy", given(grad_entropy));
  const Logits in = logits_of(logits, targets);
  const int64_t rows = in.matrix.rows;
  const Matrix out = gradient_of(grad_logits, in), kept = dense("sums", sums, Dtype::float32, 3, rows);
  const auto* g = vector<const float>("grad_logp", grad_logp, rows);
  const auto* h = vector_or_null<const float>("grad_entropy", grad_entropy, rows);
  const auto* entropies = vector_or_null<const float>("entropy", entropy, rows);
  const Run how = run(in.type, setting);
  py::gil_scoped_release release;
  token_logp_grad(out, in.matrix, in.targets, static_cast<const float*>(kept.data), kept.row_stride, g, h, entropies,
                  how);
}

void call_token_loss(const Tensor& loss, const Tensor& logp, const Tensor& entropy, const Tensor& grad_logits,
                     const Tensor& logits, const Tensor& targets, const Tensor& weights, const Tensor& advantages,
                     const Tensor& old_logp, const Tensor& ref_logp, const Tensor& sampling_logp,
                     const Policy& policy, float grad_scale, const Setting& setting) {
  const PolicyLoss config = policy_loss(policy);
  require_beside("ref_logp", ref_logp, "a beta other than 0", config.beta != 0);
  require_beside("sampling_logp", sampling_logp, "a correction", config.correction != Correction::none);
  const Logits x = logits_of(logits, targets);
  const int64_t rows = x.matrix.rows;
  const Matrix out = given(grad_logits) ? gradient_of(grad_logits, x) : Matrix{};
  auto* total = vector<float>("loss", loss, 1);
  auto* row_logp = vector<float>("logp", logp, rows);
  auto* row_entropy = vector<float>("entropy", entropy, rows);
  const TokenLoss in{vector<const float>("weights", weights, rows),
                     vector<const float>("advantages", advantages, rows),
                     vector_or_null<const float>("old_logp", old_logp, rows),
                     vector_or_null<const float>("ref_logp", ref_logp, rows),
                     vector_or_null<const float>("sampling_logp", sampling_logp, rows),
                     config,
                     grad_scale};
  const Run how = run(x.type, setting);
  py::gil_scoped_release release;
  token_loss(total, row_logp, row_entropy, out, x.matrix, x.targets, in, how);
}

void call_scale_in_place(const Tensor& x, float factor, const Setting& setting) {
  const ElementType type = element_type("x", x);
  const Matrix all = output("x", matrix("x", x, dtype(type), std::get<2>(x), std::get<3>(x)));
  const Run how = run(type, setting);
  py::gil_scoped_release release;
  scale_in_place(all, factor, how);
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
