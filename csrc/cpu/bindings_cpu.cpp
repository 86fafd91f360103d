// redit_fast._cpu: tensors as numbers and a thread count in, nothing out. No PyTorch header, so one binary serves every
// torch. redit_fast/backends/cpu/ is the only caller: it passes data_ptr() and bumps the version counters. All bindings
// are one file for the compiler: pybind11's headers alone take 4.4 of 6 s.

#include <string>

#include "advantages.h"
#include "bindings.h"
#include "bindings/advantages.h"
#include "bindings_linear_loss.h"
#include "bindings_params.h"
#include "bindings_token_loss.h"

namespace py = pybind11;

namespace redit {

namespace {

void call_group_advantages(const Tensors<6>& outputs, const Tensors<5>& inputs, py::handle options, int64_t group_size,
                           py::handle processor) {
  const GroupAdvantages args = group_advantages_of(outputs, inputs, options);
  check_groups(group_size, inputs);
  if (args.in.groups)
    for (int64_t i = 0; i < args.in.samples; ++i)
      if (args.in.groups[i] < 0 || args.in.groups[i] >= args.in.samples)
        throw std::invalid_argument("groups must be in [0, " + std::to_string(args.in.samples) + "), got " +
                                    std::to_string(args.in.groups[i]));
  const Processor its = processor_of(processor);
  py::gil_scoped_release release;
  group_advantages(args, group_size, its);
}

}  // namespace

void bind(py::module_& module) {
  module.def("group_advantages", &call_group_advantages);
  bind_token_loss(module);
  bind_linear_loss(module);
  bind_params(module);
}

}  // namespace redit

PYBIND11_MODULE(_cpu, module) { redit::bind(module); }
