// The token-loss functions of redit_fast._cpu; see bindings_cpu.cpp.
#pragma once

#include "bindings.h"
#include "bindings/token_loss.h"
#include "token_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

void call_token_logp(const Tensors<3>& outputs, const Tensors<2>& logits, py::handle transform, py::handle processor) {
  const TokenLogp args = token_logp_of(outputs, logits);
  const Run run = run_of(args.logits.type, transform, processor);
  py::gil_scoped_release release;
  token_logp(args, run);
}

void call_token_logp_grad(const Tensor& grad, const Tensors<2>& logits, const Tensors<4>& upstream,
                          py::handle transform, py::handle processor) {
  const TokenLogpGrad args = token_logp_grad_of(grad, logits, upstream);
  const Run run = run_of(args.logits.type, transform, processor);
  py::gil_scoped_release release;
  token_logp_grad(args, run);
}

void call_token_loss(const Tensors<4>& outputs, const Tensors<2>& logits, const Tensors<5>& rows, py::handle policy,
                     const Tensor& grad_scale, py::handle transform, py::handle processor) {
  const TokenLoss args = token_loss_of(outputs, logits, rows, policy, grad_scale);
  const Run run = run_of(args.logits.type, transform, processor);
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

inline void bind_token_loss(py::module_& module) {
  module.def("best_level", &best_level);
  module.def("token_logp", &call_token_logp);
  module.def("token_logp_grad", &call_token_logp_grad);
  module.def("token_loss", &call_token_loss);
  module.def("scale_in_place", &call_scale_in_place);
}

}  // namespace redit
