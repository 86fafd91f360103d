// The token-loss functions of redit_fast._cpu; see bindings_cpu.cpp.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>

#include "token_loss.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;   // address, rows, columns, strides
using Policy = std::tuple<int, int, int, bool, float, float, float, float, float, float, float, float, float, float>;
using Setting = std::tuple<int, double, float, float, bool, int, int>;     // type, transform, threads, level (-1: best)

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

redit::Matrix matrix(const Strided& in) {
  const auto& [address, rows, columns, row_stride, column_stride] = in;
  return {pointer<void>(address), rows, columns, row_stride, column_stride};
}

redit::PolicyLoss policy_loss(const Policy& in) {
  const auto& [form, kl, correction, corrected, low, high, delta, dual, positive, negative, dro, beta, floor, cap] = in;
  return {redit::LossForm(form), redit::Kl(kl), redit::Correction(correction), corrected, low, high, delta, dual,
          positive, negative, dro, beta, floor, cap};
}

redit::Run run(const Setting& in) {
  const auto& [type, slope, inner, outer, capped, threads, level] = in;
  if (level > redit::best_level()) throw std::invalid_argument("this processor lacks the instruction set asked for");
  return {redit::ElementType(type), {slope, inner, outer, capped}, threads, level < 0 ? redit::best_level() : level};
}

void token_logp(Address logp, Address entropy, Address sums, int64_t sums_stride, const Strided& logits,
                Address targets, const Setting& setting) {
  const redit::TokenForward out{pointer<float>(logp), pointer<float>(entropy), pointer<float>(sums), sums_stride};
  const redit::Run how = run(setting);
  py::gil_scoped_release release;
  redit::token_logp(out, matrix(logits), pointer<const int64_t>(targets), how);
}

void token_logp_grad(const Strided& grad, const Strided& logits, Address targets, Address sums, int64_t sums_stride,
                     Address grad_logp, Address grad_entropy, Address entropy, const Setting& setting) {
  const redit::Run how = run(setting);
  py::gil_scoped_release release;
  redit::token_logp_grad(matrix(grad), matrix(logits), pointer<const int64_t>(targets), pointer<const float>(sums),
                         sums_stride, pointer<const float>(grad_logp), pointer<const float>(grad_entropy),
                         pointer<const float>(entropy), how);
}

void token_loss(Address loss, Address logp, Address entropy, const Strided& grad, const Strided& logits,
                Address targets, Address weights, Address advantages, Address old_logp, Address ref_logp,
                Address sampling_logp, const Policy& policy, float grad_scale, const Setting& setting) {
  const redit::TokenLoss in{pointer<const float>(weights),
                            pointer<const float>(advantages),
                            pointer<const float>(old_logp),
                            pointer<const float>(ref_logp),
                            pointer<const float>(sampling_logp),
                            policy_loss(policy),
                            grad_scale};
  const redit::Run how = run(setting);
  py::gil_scoped_release release;
  redit::token_loss(pointer<float>(loss), pointer<float>(logp), pointer<float>(entropy), matrix(grad), matrix(logits),
                    pointer<const int64_t>(targets), in, how);
}

void scale_in_place(const Strided& x, float factor, const Setting& setting) {
  const redit::Run how = run(setting);
  py::gil_scoped_release release;
  redit::scale_in_place(matrix(x), factor, how);
}

}  // namespace

void bind_token_loss(py::module_& module) {
  module.def("best_level", &redit::best_level);
  module.def("token_logp", &token_logp);
  module.def("token_logp_grad", &token_logp_grad);
  module.def("token_loss", &token_loss);
  module.def("scale_in_place", &scale_in_place);
}
