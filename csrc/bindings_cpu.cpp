// redit_fast._cpu: raw pointers, sizes and a thread count in, nothing out. No PyTorch header, so one binary serves
// every torch. redit_fast/backends/cpu.py is the only caller: it passes data_ptr() and bumps the version counters.

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

void call_group_advantages(Address values, Address group_mean, Address group_std, Address dead, Address dithered_mean,
                           Address dithered_std, Address rewards, Address groups, Address sample_ids, Address weights,
                           Address half_range, int64_t samples, int64_t reward_count, const std::string& distribution,
                           uint64_t seed, uint32_t step, const std::string& dead_groups, const std::string& baseline,
                           const std::string& scale, const std::string& combine, double eps, int ddof, int threads) {
  const AdvantagesOut out{pointer<float>(values), pointer<float>(group_mean),    pointer<float>(group_std),
                          pointer<bool>(dead),    pointer<float>(dithered_mean), pointer<float>(dithered_std)};
  const AdvantagesIn in{pointer<double>(rewards),
                        pointer<int64_t>(groups),
                        pointer<int64_t>(sample_ids),
                        pointer<double>(weights),
                        pointer<double>(half_range),
                        samples,
                        reward_count};
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
