// The passes over parameters of redit_fast._cuda; see bindings_cuda.cpp.
#pragma once

#include "bindings/params.h"
#include "cuda/params.h"

namespace py = pybind11;

namespace redit {
namespace {

using cuda::Device, cuda::Launches;

void require_kernels(const char* name, const Arrays& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    require(tensors[i].dtype <= Dtype::float16, std::string(name) + "[" + std::to_string(i) +
                                                    "] must be float32, bfloat16 or float16, got " +
                                                    name_of(int(tensors[i].dtype)));
}

double* room_for(const Tensor& partials, int sums, const Sizes& numels) {
  int64_t chunks = 0;
  for (int64_t numel : numels) chunks += chunks_of(numel);
  return vector<double>("partials", partials, sums * chunks);
}

Launches call_squared_norm(const Tensor& out, const Table& tensors, const Tensor& partials, py::handle device) {
  const SquaredNorm args = squared_norm_of(out, tensors);
  require_kernels("tensors", args.tensors);
  return plan_squared_norm(args, room_for(partials, 1, args.numels), filled<Device>("device", device));
}

Launches call_perturb(const Tensor& sums, const Table& params, const Table& grads, const Sizes& offsets,
                      const Tensors<2>& numbers, py::handle options, const Tensor& partials, py::handle device) {
  const Perturbation args = perturbation_of(sums, params, grads, offsets, numbers, options);
  require_kernels("params", args.params);
  require_kernels("grads", args.grads);
  return plan_perturb(args, room_for(partials, 4, args.numels), filled<Device>("device", device));
}

Launches call_combine(const Tensor& sums, const Table& firsts, const Table& grads, double ratio, const Tensor& partials,
                      py::handle device) {
  const Combination args = combination_of(sums, firsts, grads, ratio);
  require_kernels("grads", args.grads);
  return plan_combine(args, room_for(partials, 3, args.numels), filled<Device>("device", device));
}

Launches call_adamw(const std::array<Table, 6>& lists, const Tensors<2>& numbers, py::handle options,
                    const Tensor& scalars, py::handle device) {
  const AdamwStep args = adamw_step_of(lists, numbers, options);
  require_kernels("params", args.params);
  require_kernels("grads", args.grads);
  static_assert(sizeof(AdamwScalars<float>) == 10 * sizeof(float));
  auto* room = vector<float>("scalars", scalars, 10 * int64_t(args.steps.size()));
  return plan_adamw(args, reinterpret_cast<AdamwScalars<float>*>(room), filled<Device>("device", device));
}

}  // namespace

inline void bind_params(py::module_& module) {
  module.attr("weights_per_chunk") = kWeights;
  module.def("squared_norm", &call_squared_norm);
  module.def("perturb", &call_perturb);
  module.def("combine", &call_combine);
  module.def("adamw", &call_adamw);
}

}  // namespace redit
