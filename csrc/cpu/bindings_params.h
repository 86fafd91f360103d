// Bindings of the passes over parameters: (address, dtype, elements) lists from redit_fast/backends/cpu/.
#pragma once

#include "bindings.h"
#include "bindings/params.h"
#include "params.h"

namespace py = pybind11;

namespace redit {
namespace {

void call_squared_norm(const Tensor& out, const Table& tensors, py::handle processor) {
  const SquaredNorm args = squared_norm_of(out, tensors);
  const auto [threads, level] = processor_of(processor);
  py::gil_scoped_release release;
  squared_norm(args, threads, level);
}

void call_perturb(const Tensor& sums, const Table& params, const Table& grads, const Sizes& offsets,
                  const Tensors<2>& numbers, py::handle options, py::handle processor) {
  const Perturbation args = perturbation_of(sums, params, grads, offsets, numbers, options);
  require(*args.step >= 0 && *args.step < int64_t(1) << 32,
          "step must be in [0, 2^32), got " + std::to_string(*args.step));
  const auto [threads, level] = processor_of(processor);
  py::gil_scoped_release release;
  perturb(args, threads, level);
}

void call_combine(const Tensor& sums, const Table& firsts, const Table& grads, double ratio, py::handle processor) {
  const Combination args = combination_of(sums, firsts, grads, ratio);
  const auto [threads, level] = processor_of(processor);
  py::gil_scoped_release release;
  combine(args, threads, level);
}

void call_adamw(const std::array<Table, 6>& lists, const Tensors<2>& numbers, py::handle options,
                py::handle processor) {
  const AdamwStep args = adamw_step_of(lists, numbers, options);
  const auto [threads, level] = processor_of(processor);
  py::gil_scoped_release release;
  adamw(args, threads, level);
}

}  // namespace

inline void bind_params(py::module_& module) {
  module.def("squared_norm", &call_squared_norm);
  module.def("perturb", &call_perturb);
  module.def("combine", &call_combine);
  module.def("adamw", &call_adamw);
}

}  // namespace redit
