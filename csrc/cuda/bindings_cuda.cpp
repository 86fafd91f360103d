// redit_fast._cuda: tensors as numbers in, a list of launches out, and launch(), which sends such a list to a device.
// It links the CUDA runtime, statically, and nothing of PyTorch. redit_fast/backends/cuda/ is the only caller. One
// file for the compiler, as csrc/cpu/bindings_cpu.cpp.

#include <cuda_runtime_api.h>

#include "bindings/advantages.h"
#include "cuda/advantages.h"
#include "cuda/bindings_linear_loss.h"
#include "cuda/bindings_params.h"
#include "cuda/bindings_token_loss.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace redit {

namespace {

using cuda::Device, cuda::Launch, cuda::Launches;

// order, starts (by ids) and room (over the batch) may be absent: shared/args.h, cuda/advantages.h.
Launches call_group_advantages(const Tensors<6>& outputs, const Tensors<5>& inputs, py::handle options,
                               const Tensors<3>& scratch, int64_t group_size, py::handle device) {
  const GroupAdvantages args = group_advantages_of(outputs, inputs, options);
  const auto& [order, starts, room] = scratch;
  const int64_t samples = args.in.samples, K = args.in.reward_count;
  require(K <= kMostRewards,
          "rewards must have at most " + std::to_string(kMostRewards) + " columns, got " + std::to_string(K));
  check_groups(group_size, inputs);
  AdvantagesLaunch a{};
  a.out = args.out, a.in = args.in, a.options = args.options;
  std::copy_n(args.in.weights, K, a.weights);
  a.dithered = args.in.half_range;
  if (a.dithered) std::copy_n(args.in.half_range, K, a.half_range);
  a.in.weights = a.in.half_range = nullptr;
  a.group_size = group_size;
  a.groups = group_size ? samples / group_size : samples;
  if (!group_size) {
    a.order = vector<const int64_t>("order", order, samples);
    a.starts = vector<const int64_t>("starts", starts, samples + 1);
  }
  if (a.options.scale == Scale::batch || a.options.combine == Combine::normalize_then_sum) {
    double* free = vector<double>("room", room, a.groups * (3 * K + 2) + 3);
    static_assert(sizeof(ColumnResult) == 3 * sizeof(double) && sizeof(Moments) == 3 * sizeof(double));
    a.batch = reinterpret_cast<Moments*>(free);
    a.columns = reinterpret_cast<ColumnResult*>(free + 3);
    a.sums = free + 3 + 3 * a.groups * K;
    a.counts = a.sums + a.groups;
  }
  return plan_advantages(a, filled<Device>("device", device));
}

void call_launch(const Launches& launches, int device, Address stream) {
  py::gil_scoped_release release;
  cuda::launch(launches, device, reinterpret_cast<void*>(stream));
}

std::tuple<int, int, int, int, int> call_device(int index) {
  const Device found = cuda::device_of(index);
  return {found.ordinal, found.architecture, found.multiprocessors, found.shared_bytes, found.clusters};
}

}  // namespace

void bind(py::module_& module) {
  py::class_<Launch>(module, "Launch")
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("blocks", &Launch::blocks)
      .def_readonly("threads", &Launch::threads)
      .def_readonly("cluster", &Launch::cluster)
      .def_readonly("shared", &Launch::shared)
      .def_property_readonly("params", [](const Launch& launch) { return py::bytes(launch.params); });
  module.attr("architectures") = REDIT_CUDA_ARCHITECTURES;  // "sm_90a compute_100", as nvcc was asked for
  module.attr("toolkit") = CUDART_VERSION;                  // 13000: CUDA 13.0
  module.def("device", &call_device);
  module.def("launch", &call_launch);
  module.def("group_advantages", &call_group_advantages);
  bind_params(module);
  bind_token_loss(module);
  bind_linear_loss(module);
}

}  // namespace redit

PYBIND11_MODULE(_cuda, module) { redit::bind(module); }
