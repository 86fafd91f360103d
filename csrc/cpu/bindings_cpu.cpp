// redit_fast._cpu: tensors as numbers and a thread count in, nothing out. No PyTorch header, so one binary serves every
// torch. redit_fast/backends/cpu/ is the only caller: it passes data_ptr() and bumps the version counters.

#include <string>

#include "advantages.h"
#include "bindings.h"
#include "bindings/advantages.h"

namespace py = pybind11;

namespace redit {

// each in bindings_<name>.cpp
void bind_token_loss(py::module_& module);
void bind_linear_loss(py::module_& module);
void bind_params(py::module_& module);

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
