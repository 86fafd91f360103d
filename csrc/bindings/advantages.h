// The arguments of the advantages.
#pragma once

#include "bindings/tensors.h"

namespace redit {

inline GroupAdvantages group_advantages_of(const Tensors<6>& outputs, const Tensors<5>& inputs,
                                           pybind11::handle options) {
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
                        vector_or_null<int64_t>("groups", groups, samples),
                        vector_or_null<int64_t>("sample_ids", sample_ids, samples),
                        vector<double>("weights", weights, reward_count),
                        vector_or_null<double>("half_range", half_range, reward_count),
                        samples,
                        reward_count};
  return {out, in, filled<AdvantageOptions>("options", options)};
}

inline void check_groups(int64_t group_size, const Tensors<5>& inputs) {
  const int64_t samples = std::get<2>(inputs[0]);
  if (group_size < 0 || (group_size > 0) == given(inputs[1]))
    throw std::invalid_argument("either groups or a group_size above 0 must be given");
  if (group_size > 0 && samples % group_size)
    throw std::invalid_argument("group_size must divide the number of samples, got " + std::to_string(group_size) +
                                " for " + std::to_string(samples));
}

}  // namespace redit
