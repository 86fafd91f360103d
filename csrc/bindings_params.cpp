// Bindings of the passes over parameters: (address, dtype) lists from redit_fast/backends/cpu.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "params.h"

namespace py = pybind11;

namespace redit {
namespace {

using Table = std::vector<std::pair<Address, int>>;  // address (0: absent), Dtype

Arrays arrays(const Table& table) {
  Arrays result;
  for (const auto& [address, dtype] : table) result.push_back({pointer<void>(address), Dtype(dtype)});
  return result;
}

}  // namespace

void bind_params(py::module_& module) {
  module.def("squared_norm", [](Address out, const Table& tensors, const Sizes& numels, int threads, int level) {
    const Arrays table = arrays(tensors);
    level = checked(level);
    py::gil_scoped_release release;
    *pointer<double>(out) = squared_norm(table, numels, threads, level);
  });
  module.def("perturb", [](Address sums, const Table& params, const Table& grads, const Sizes& numels,
                           const Sizes& offsets, double scale, double grad_factor, bool stochastic, uint64_t seed,
                           uint32_t step, int compute_dtype, int threads, int level) {
    const Arrays p = arrays(params), g = arrays(grads);
    level = checked(level);
    py::gil_scoped_release release;
    perturb(*pointer<double[4]>(sums), p, g, numels, offsets,
            {scale, grad_factor, stochastic, seed, step, compute_dtype}, threads, level);
  });
  module.def("combine", [](Address sums, const Table& firsts, const Table& grads, const Sizes& numels, double ratio,
                           int threads, int level) {
    const Arrays first = arrays(firsts), g = arrays(grads);
    level = checked(level);
    py::gil_scoped_release release;
    combine(*pointer<double[3]>(sums), first, g, numels, ratio, threads, level);
  });
  module.def("adamw", [](const Table& params, const Table& masters, const Table& grads, const Table& exp_avgs,
                         const Table& exp_avg_sqs, const std::vector<Address>& steps, const Sizes& numels,
                         double factor, bool finite, double lr, double beta1, double beta2, double eps,
                         double weight_decay, int threads, int level) {
    AdamwTable table{arrays(params),      arrays(masters), arrays(grads), arrays(exp_avgs),
                     arrays(exp_avg_sqs), {},              numels};
    for (Address step : steps) table.steps.push_back(pointer<float>(step));
    level = checked(level);
    py::gil_scoped_release release;
    adamw(table, {factor, finite, lr, beta1, beta2, eps, weight_decay}, threads, level);
  });
}

}  // namespace redit
