// The token-loss functions of redit_fast._cpu; see bindings_cpu.cpp.

#include "bindings.h"
#include "token_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

using Policy = std::tuple<int, int, int, bool, float, float, float, float, float, float, float, float, float, float>;

PolicyLoss policy_loss(const Policy& in) {
  const auto& [form, kl, correction, corrected, low, high, delta, dual, positive, negative, dro, beta, floor, cap] = in;
  return {LossForm(form), Kl(kl), Correction(correction), corrected, low, high, delta, dual,
          positive, negative, dro, beta, floor, cap};
}

void call_token_logp(Address logp, Address entropy, Address sums, int64_t sums_stride, const Strided& logits,
                     Address targets, const Setting& setting) {
  const TokenForward out{pointer<float>(logp), pointer<float>(entropy), pointer<float>(sums), sums_stride};
  const Run how = run(setting);
  py::gil_scoped_release release;
  token_logp(out, matrix(logits), pointer<const int64_t>(targets), how);
}

void call_token_logp_grad(const Strided& grad, const Strided& logits, Address targets, Address sums,
                          int64_t sums_stride, Address grad_logp, Address grad_entropy, Address entropy,
                          const Setting& setting) {
  const Run how = run(setting);
  py::gil_scoped_release release;
  token_logp_grad(matrix(grad), matrix(logits), pointer<const int64_t>(targets), pointer<const float>(sums),
                  sums_stride, pointer<const float>(grad_logp), pointer<const float>(grad_entropy),
                  pointer<const float>(entropy), how);
}

void call_token_loss(Address loss, Address logp, Address entropy, const Strided& grad, const Strided& logits,
                     Address targets, Address weights, Address advantages, Address old_logp, Address ref_logp,
                     Address sampling_logp, const Policy& policy, float grad_scale, const Setting& setting) {
  const TokenLoss in{pointer<const float>(weights),
                     pointer<const float>(advantages),
                     pointer<const float>(old_logp),
                     pointer<const float>(ref_logp),
                     pointer<const float>(sampling_logp),
                     policy_loss(policy),
                     grad_scale};
  const Run how = run(setting);
  py::gil_scoped_release release;
  token_loss(pointer<float>(loss), pointer<float>(logp), pointer<float>(entropy), matrix(grad), matrix(logits),
             pointer<const int64_t>(targets), in, how);
}

void call_scale_in_place(const Strided& x, float factor, const Setting& setting) {
  const Run how = run(setting);
  py::gil_scoped_release release;
  scale_in_place(matrix(x), factor, how);
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
