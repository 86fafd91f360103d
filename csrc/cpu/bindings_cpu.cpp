// redit_fast._cpu: tensors as numbers and a thread count in, nothing out. No PyTorch header, so one binary serves every
// torch. redit_fast/backends/cpu/ is the only caller: it passes data_ptr() and bumps the version counters.

#include <string>

#include "advantages.h"
#include "bindings.h"

namespace py = pybind11;

namespace redit {

// each in bindings_<name>.cpp
void bind_token_loss(py::module_& module);
void bind_linear_loss(py::module_& module);
void bind_params(py::module_& module);

namespace {

GroupAdvantages group_advantages_of(const Tensors<6>& outputs, const Tensors<5>& inputs, py::handle options) {
  const auto& [values, group_mean, group_std, dead, dithered_mean, dithered_std] = outputs;
  const auto& [rewards, groups, sample_ids, weights, half_range] = inputs;
  const int64_t samples = std::get<2>(rewards), reward_count = std::get<3>(rewards);
  if (reward_count < 1) throw std::invalid_argument("rewards must have at least one column, got " + describe(rewards));
  const AdvantagesOut out{vector<float>("values", values, samples),
                          vector<float>("group_mean", group_mean, samples),
                          vector<float>("group_std", group_std, samples),
                          vector<bool>("dead", dead, samples),
                          vector<float>("dithered_mean", dithered_mean, samples),
                          vector<float>("dithered_std", dithered_std, samples)};
  const Matrix all_rewards = dense("rewards", rewards, Dtype::float64, samples, reward_count);
  if (samples >= 2 && all_rewards.row_stride != reward_count)
    throw std::invalid_argument("rewards must be contiguous, got " + describe(rewards));
  const AdvantagesIn in{static_cast<const double*>(all_rewards.data),
                        vector<int64_t>("groups", groups, samples),
                        vector<int64_t>("sample_ids", sample_ids, samples),
                        vector<double>("weights", weights, reward_count),
                        vector_or_null<double>("half_range", half_range, reward_count),
                        samples,
                        reward_count};
  for (int64_t i = 0; i < samples; ++i)
    if (in.groups[i] < 0 || in.groups[i] >= samples)
      throw std::invalid_argument("groups must be in [0, " + std::to_string(samples) + "), got " +
                                  std::to_string(in.groups[i]));
  return {out, in, filled<AdvantageOptions>("options", options)};
}

void call_group_advantages(const Tensors<6>& outputs, const Tensors<5>& inputs, py::handle options,
                           py::handle processor) {
  const GroupAdvantages args = group_advantages_of(outputs, inputs, options);
  const int threads = processor_of(processor).threads;
  py::gil_scoped_release release;
  group_advantages(args, threads);
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
