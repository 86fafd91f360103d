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

// The index of `value` among `names`; Python checks its arguments, so a miss here is two files that disagree.
template <size_t count>
int choice(const std::string& value, const char* const (&names)[count]) {
  for (size_t i = 0; i < count; ++i)
    if (value == names[i]) return int(i);
  throw std::invalid_argument("redit_fast._cpu does not know the option '" + value + "'");
}

void call_group_advantages(const Tensor& values, const Tensor& group_mean, const Tensor& group_std, const Tensor& dead,
                           const Tensor& dithered_mean, const Tensor& dithered_std, const Tensor& rewards,
                           const Tensor& groups, const Tensor& sample_ids, const Tensor& weights,
                           const Tensor& half_range, const std::string& distribution, uint64_t seed, uint32_t step,
                           const std::string& dead_groups, const std::string& baseline, const std::string& scale,
                           const std::string& combine, double eps, int ddof, int threads) {
  const int64_t samples = std::get<2>(rewards), reward_count = std::get<3>(rewards);
  require(reward_count >= 1, "rewards must have at least one column, got " + describe(rewards));
  const AdvantagesOut out{vector<float>("values", values, samples),
                          vector<float>("group_mean", group_mean, samples),
                          vector<float>("group_std", group_std, samples),
                          vector<bool>("dead", dead, samples),
                          vector<float>("dithered_mean", dithered_mean, samples),
                          vector<float>("dithered_std", dithered_std, samples)};
  const Matrix all_rewards = dense("rewards", rewards, Dtype::float64, samples, reward_count);
  require(samples < 2 || all_rewards.row_stride == reward_count,
          "rewards must be contiguous, got " + describe(rewards));
  const AdvantagesIn in{static_cast<const double*>(all_rewards.data),
                        vector<int64_t>("groups", groups, samples),
                        vector<int64_t>("sample_ids", sample_ids, samples),
                        vector<double>("weights", weights, reward_count),
                        vector_or_null<double>("half_range", half_range, reward_count),
                        samples,
                        reward_count};
  for (int64_t i = 0; i < samples; ++i)
    require(in.groups[i] >= 0 && in.groups[i] < samples,
            "groups must be in [0, " + std::to_string(samples) + "), got " + std::to_string(in.groups[i]));
  enum { apply, skip, center_only, only };
  const int policy = choice(dead_groups, {"apply", "skip", "center_only", "only"});
  const AdvantagesOptions options{choice(distribution, {"uniform", "gaussian"}) == 1,
                                  policy != only,
                                  policy != skip,
                                  policy == center_only,
                                  choice(baseline, {"mean", "leave_one_out"}) == 1,
                                  Scale(choice(scale, {"group", "batch", "none"})),
                                  Combine(choice(combine, {"sum_then_normalize", "normalize_then_sum"})),
                                  seed,
                                  step,
                                  eps,
                                  ddof};
  checked_threads(threads);
  py::gil_scoped_release release;
  group_advantages(out, in, options, threads);
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
