// The token-loss functions of redit_fast._cuda; see bindings_cuda.cpp.
#pragma once

#include "bindings/token_loss.h"
#include "cuda/token_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

using cuda::Device, cuda::Launches;

// A kernel counts the columns in 32 bits.
const Matrix& countable(const char* name, const Matrix& x) {
  require(x.columns <= kMostColumns, std::string(name) + " must have at most " + std::to_string(kMostColumns) +
                                         " columns, got " + std::to_string(x.columns));
  return x;
}

Launches call_token_logp(const Tensors<3>& outputs, const Tensors<2>& logits, py::handle transform, py::handle device) {
  const TokenLogp op = token_logp_of(outputs, logits);
  countable("logits", op.logits.matrix);
  return plan_token_logp(op, filled<TransformConstants>("transform", transform), filled<Device>("device", device));
}

Launches call_token_logp_grad(const Tensor& grad, const Tensors<2>& logits, const Tensors<4>& upstream,
                              py::handle transform, py::handle device) {
  const TokenLogpGrad op = token_logp_grad_of(grad, logits, upstream);
  countable("logits", op.logits.matrix);
  return plan_token_logp_grad(op, filled<TransformConstants>("transform", transform), filled<Device>("device", device));
}

// row_losses (R,): room.
Launches call_token_loss(const Tensors<4>& outputs, const Tensors<2>& logits, const Tensors<5>& rows, py::handle policy,
                         const Tensor& grad_scale, py::handle transform, const Tensor& row_losses, py::handle device) {
  const TokenLoss op = token_loss_of(outputs, logits, rows, policy, grad_scale);
  const Matrix& x = countable("logits", op.logits.matrix);
  return plan_token_loss(op, filled<TransformConstants>("transform", transform),
                         vector<float>("row_losses", row_losses, x.rows), filled<Device>("device", device));
}

Launches call_scale_in_place(const Tensor& x, const Tensor& factor, py::handle device) {
  const Dtype type = element_type("x", x);
  const Matrix all = output("x", matrix("x", x, type, std::get<2>(x), std::get<3>(x)));
  return plan_scale_in_place(countable("x", all), type, vector<const float>("factor", factor, 1),
                             filled<Device>("device", device));
}

}  // namespace

inline void bind_token_loss(py::module_& module) {
  module.def("token_logp", &call_token_logp);
  module.def("token_logp_grad", &call_token_logp_grad);
  module.def("token_loss", &call_token_loss);
  module.def("scale_in_place", &call_scale_in_place);
}

}  // namespace redit
