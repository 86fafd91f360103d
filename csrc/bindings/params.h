// The arguments of the passes over parameters: lists of (address, dtype, elements).
#pragma once

#include <limits>
#include <vector>

#include "bindings/tensors.h"

namespace redit {

using Table = std::vector<std::tuple<Address, int, int64_t>>;  // address (0: absent), Dtype, elements

inline Sizes sizes_of(const Table& table) {
  Sizes result;
  for (const auto& [address, dtype, numel] : table) result.push_back(numel);
  return result;
}

// As many as there are `numels`, each of that many elements; absent only where `optional`.
inline Arrays arrays(const char* name, const Table& table, const Sizes& numels, bool optional = false) {
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
inline void require_wide(const char* name, const Arrays& tensors, const Arrays& params) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Dtype wide = params[i].dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    require(!tensors[i].data || tensors[i].dtype == wide, std::string(name) + "[" + std::to_string(i) + "] must be " +
                                                              name_of(int(wide)) + ", got " +
                                                              name_of(int(tensors[i].dtype)));
  }
}

inline SquaredNorm squared_norm_of(const Tensor& out, const Table& tensors) {
  const Sizes numels = sizes_of(tensors);
  return {vector<double>("out", out, 1), arrays("tensors", tensors, numels), numels};
}

inline Perturbation perturbation_of(const Tensor& sums, const Table& params, const Table& grads, const Sizes& offsets,
                                    const Tensors<2>& numbers, pybind11::handle options) {
  const auto& [scale, step] = numbers;
  const Sizes numels = sizes_of(params);
  const Perturbation args{vector<double>("sums", sums, 4),
                          vector<const double>("scale", scale, 1),
                          vector<const int64_t>("step", step, 1),
                          arrays("params", params, numels),
                          arrays("grads", grads, numels),
                          numels,
                          offsets,
                          filled<PerturbOptions>("options", options)};
  require(offsets.size() == numels.size(),
          "offsets must be a list of " + std::to_string(numels.size()) + ", got " + std::to_string(offsets.size()));
  for (size_t i = 0; i < offsets.size(); ++i)
    require(offsets[i] >= 0 && offsets[i] <= std::numeric_limits<int64_t>::max() - numels[i],
            "offsets must be at least 0 and leave room for their tensor, got " + std::to_string(offsets[i]));
  const int seen = args.options.compute_dtype;
  require(seen >= -1 && seen <= int(Dtype::float64),
          "compute_dtype must be -1 or a floating dtype, got " + std::to_string(seen));
  return args;
}

inline Combination combination_of(const Tensor& sums, const Table& firsts, const Table& grads, double ratio) {
  const Sizes numels = sizes_of(grads);
  const Combination args{vector<double>("sums", sums, 3), arrays("firsts", firsts, numels),
                         arrays("grads", grads, numels), numels, ratio};
  for (size_t i = 0; i < numels.size(); ++i) {
    const Dtype first = args.firsts[i].dtype, grad = args.grads[i].dtype;
    require(first == grad, "firsts[" + std::to_string(i) + "] must be " + name_of(int(grad)) +
                               " as its gradient, got " + name_of(int(first)));
  }
  return args;
}

inline AdamwStep adamw_step_of(const std::array<Table, 6>& lists, const Tensors<2>& numbers, pybind11::handle options) {
  const auto& [params, masters, grads, exp_avgs, exp_avg_sqs, steps] = lists;
  const auto& [factor, finite] = numbers;
  const Sizes numels = sizes_of(params);
  AdamwStep args{arrays("params", params, numels),
                 arrays("masters", masters, numels, true),
                 arrays("grads", grads, numels),
                 arrays("exp_avgs", exp_avgs, numels),
                 arrays("exp_avg_sqs", exp_avg_sqs, numels),
                 {},
                 numels,
                 vector<const double>("factor", factor, 1),
                 vector<const bool>("finite", finite, 1),
                 filled<AdamwOptions>("options", options)};
  require_wide("masters", args.masters, args.params);
  require_wide("exp_avgs", args.exp_avgs, args.params);
  require_wide("exp_avg_sqs", args.exp_avg_sqs, args.params);
  for (size_t i = 0; i < numels.size(); ++i) {
    const bool narrow = args.params[i].dtype == Dtype::bfloat16 || args.params[i].dtype == Dtype::float16;
    require(!narrow || args.masters[i].data || numels[i] == 0,
            "masters[" + std::to_string(i) + "] must be given for a parameter of 16 bits, got None");
  }
  for (const Array& step : arrays("steps", steps, Sizes(numels.size(), 1))) {
    require(step.dtype == Dtype::float32, "steps must be float32, got " + name_of(int(step.dtype)));
    args.steps.push_back(static_cast<float*>(step.data));
  }
  return args;
}

}  // namespace redit
