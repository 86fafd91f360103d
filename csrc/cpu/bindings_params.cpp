// Bindings of the passes over parameters: (address, dtype, elements) lists from redit_fast/backends/cpu/.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "params.h"

namespace py = pybind11;

namespace redit {
namespace {

using Table = std::vector<std::tuple<Address, int, int64_t>>;  // address (0: absent), Dtype, elements

Sizes sizes_of(const Table& table) {
  Sizes result;
  for (const auto& [address, dtype, numel] : table) result.push_back(numel);
  return result;
}

// As many as there are `numels`, each of that many elements; absent only where `optional`.
Arrays arrays(const char* name, const Table& table, const Sizes& numels, bool optional = false) {
  require(table.size() == numels.size(), std::string(name) + " must be a list of " + std::to_string(numels.size()) +
                                             ", got " + std::to_string(table.size()));
  Arrays result;
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [address, dtype, numel] = table[i];
    const std::string place = std::string(name) + "[" + std::to_string(i) + "]";
    if (optional && !address && numel == 0 && numels[i] > 0) {
      result.push_back({nullptr, Dtype::float32});
      continue;
    }
    require(numel == numels[i] && numel >= 0 && (address || numel == 0),
            place + " must have " + std::to_string(numels[i]) + " elements, got " +
                (address ? std::to_string(numel) : "None"));
    require(dtype >= 0 && dtype <= int(Dtype::float64),
            place + " must be float32, bfloat16, float16 or float64, got " + name_of(dtype));
    result.push_back({reinterpret_cast<void*>(address), Dtype(dtype)});
  }
  return result;
}

// Each of the type that its parameter's state has.
void require_wide(const char* name, const Arrays& tensors, const Arrays& params) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Dtype wide = params[i].dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    require(!tensors[i].data || tensors[i].dtype == wide,
            std::string(name) + "[" + std::to_string(i) + "] must be " + name_of(int(wide)) + ", got " +
                name_of(int(tensors[i].dtype)));
  }
}

void call_squared_norm(const Tensor& out, const Table& tensors, int threads, int level) {
  auto* sum = vector<double>("out", out, 1);
  const Sizes numels = sizes_of(tensors);
  const Arrays table = arrays("tensors", tensors, numels);
  threads = checked_threads(threads), level = checked_level(level);
  py::gil_scoped_release release;
  *sum = squared_norm(table, numels, threads, level);
}

void call_perturb(const Tensor& sums, const Table& params, const Table& grads, const Sizes& offsets, double scale,
                  double grad_factor, bool stochastic, uint64_t seed, uint32_t step, int compute_dtype, int threads,
                  int level) {
  auto* out = vector<double>("sums", sums, 4);
  const Sizes numels = sizes_of(params);
  const Arrays p = arrays("params", params, numels), g = arrays("grads", grads, numels);
  require(offsets.size() == numels.size(), "offsets must be a list of " + std::to_string(numels.size()) + ", got " +
                                               std::to_string(offsets.size()));
  for (size_t i = 0; i < offsets.size(); ++i)
    require(offsets[i] >= 0 && offsets[i] <= std::numeric_limits<int64_t>::max() - numels[i],
            "offsets must be at least 0 and leave room for their tensor, got " + std::to_string(offsets[i]));
  require(compute_dtype >= -1 && compute_dtype <= int(Dtype::float64),
          "compute_dtype must be -1 or a floating dtype, got " + std::to_string(compute_dtype));
  threads = checked_threads(threads), level = checked_level(level);
  py::gil_scoped_release release;
  perturb(*reinterpret_cast<double(*)[4]>(out), p, g, numels, offsets,
          {scale, grad_factor, stochastic, seed, step, compute_dtype}, threads, level);
}

void call_combine(const Tensor& sums, const Table& firsts, const Table& grads, double ratio, int threads, int level) {
  auto* out = vector<double>("sums", sums, 3);
  const Sizes numels = sizes_of(grads);
  const Arrays first = arrays("firsts", firsts, numels), g = arrays("grads", grads, numels);
  for (size_t i = 0; i < g.size(); ++i)
    require(first[i].dtype == g[i].dtype, "firsts[" + std::to_string(i) + "] must be " + name_of(int(g[i].dtype)) +
                                              " as its gradient, got " + name_of(int(first[i].dtype)));
  threads = checked_threads(threads), level = checked_level(level);
  py::gil_scoped_release release;
  combine(*reinterpret_cast<double(*)[3]>(out), first, g, numels, ratio, threads, level);
}

void call_adamw(const Table& params, const Table& masters, const Table& grads, const Table& exp_avgs,
                const Table& exp_avg_sqs, const Table& steps, double factor, bool finite, double lr, double beta1,
                double beta2, double eps, double weight_decay, int threads, int level) {
  const Sizes numels = sizes_of(params);
  AdamwTable table{arrays("params", params, numels),     arrays("masters", masters, numels, true),
                   arrays("grads", grads, numels),       arrays("exp_avgs", exp_avgs, numels),
                   arrays("exp_avg_sqs", exp_avg_sqs, numels), {}, numels};
  require_wide("masters", table.masters, table.params);
  require_wide("exp_avgs", table.exp_avgs, table.params);
  require_wide("exp_avg_sqs", table.exp_avg_sqs, table.params);
  for (size_t i = 0; i < numels.size(); ++i) {
    const bool narrow = table.params[i].dtype == Dtype::bfloat16 || table.params[i].dtype == Dtype::float16;
    require(!narrow || table.masters[i].data || numels[i] == 0,
            "masters[" + std::to_string(i) + "] must be given for a parameter of 16 bits, got None");
  }
  for (const Array& step : arrays("steps", steps, Sizes(numels.size(), 1))) {
    require(step.dtype == Dtype::float32, "steps must be float32, got " + name_of(int(step.dtype)));
    table.steps.push_back(static_cast<float*>(step.data));
  }
  threads = checked_threads(threads), level = checked_level(level);
  py::gil_scoped_release release;
  adamw(table, {factor, finite, lr, beta1, beta2, eps, weight_decay}, threads, level);
}

}  // namespace

void bind_params(py::module_& module) {
  module.def("squared_norm", &call_squared_norm);
  module.def("perturb", &call_perturb);
  module.def("combine", &call_combine);
  module.def("adamw", &call_adamw);
}

}  // namespace redit
