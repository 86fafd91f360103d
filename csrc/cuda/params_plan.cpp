// The launches of the passes over parameters; params.cu says which there are.

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/params.h"

namespace redit {

using cuda::Device, cuda::launch_of, cuda::Launches;

namespace {

std::string name_of(Dtype dtype) {
  return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bfloat16 ? "bfloat16" : "float16";
}

int64_t all_chunks(const Sizes& numels) {
  int64_t chunks = 0;
  for (int64_t numel : numels) chunks += chunks_of(numel);
  return chunks;
}

// Tensors with elements, by the kernel that their types need, as many in a launch as it has room for. `kernel_of` and
// `entry_of` take a tensor's place in the lists, `entry_of` its first chunk too.
template <class Launch, class KernelOf, class EntryOf>
Launches over_chunks(Launch launch, const Sizes& numels, const Device& device, const KernelOf& kernel_of,
                     const EntryOf& entry_of) {
  std::map<std::string, std::vector<size_t>> groups;
  for (size_t i = 0; i < numels.size(); ++i)
    if (numels[i] > 0) groups[kernel_of(i)].push_back(i);
  Launches result;
  for (const auto& [kernel, members] : groups) {
    for (size_t next = 0; next < members.size();) {
      launch.count = launch.chunks = 0;
      for (; next < members.size() && launch.count < Launch::kMost; ++next) {
        const int64_t chunks = launch.chunks + chunks_of(numels[members[next]]);
        if (chunks > std::numeric_limits<int>::max())
          throw std::invalid_argument("a launch takes 2^46 weights at most");
        launch.tensors[launch.count++] = entry_of(members[next], launch.chunks);
        launch.chunks = int(chunks);
      }
      const int64_t blocks = std::min<int64_t>(launch.chunks, int64_t(kParamsBlocks) * device.multiprocessors);
      result.push_back(launch_of(kernel.c_str(), blocks, kParamsThreads, 1, 0, launch));
      if (launch.partials) launch.partials += launch.chunks;
    }
  }
  return result;
}

template <class Launch>
Launch launch_with(double* partials, const Sizes& numels, const decltype(Launch::numbers)& numbers) {
  Launch launch{};
  launch.partials = partials, launch.stride = all_chunks(numels), launch.numbers = numbers;
  return launch;
}

void add_up(Launches& launches, double* out, int sums, double* partials, const Sizes& numels) {
  const SumLaunch sum{out, partials, all_chunks(numels)};
  launches.push_back(launch_of("params_sum", sums, kSumThreads, 1, 0, sum));
}

}  // namespace

Launches plan_squared_norm(const SquaredNorm& args, double* partials, const Device& device) {
  Launches launches = over_chunks(
      launch_with<NormLaunch>(partials, args.numels, {}), args.numels, device,
      [&](size_t i) { return "params_norm_" + name_of(args.tensors[i].dtype); },
      [&](size_t i, int first_chunk) { return NormTensor{args.tensors[i].data, args.numels[i], first_chunk}; });
  add_up(launches, args.out, 1, partials, args.numels);
  return launches;
}

Launches plan_perturb(const Perturbation& args, double* partials, const Device& device) {
  const PerturbOptions& options = args.options;
  const Dtype seen = Dtype(options.compute_dtype);
  const PerturbNumbers numbers{args.scale,
                               args.step,
                               philox_keys(options.seed),
                               options.rounding == Rounding::stochastic,
                               options.grad_factor != 1,
                               float(options.grad_factor),
                               seen == Dtype::bfloat16 || seen == Dtype::float16 ? seen : Dtype::float32};
  Launches launches = over_chunks(
      launch_with<PerturbLaunch>(partials, args.numels, numbers), args.numels, device,
      [&](size_t i) { return "params_perturb_" + name_of(args.params[i].dtype) + "_" + name_of(args.grads[i].dtype); },
      [&](size_t i, int first_chunk) {
        return PerturbTensor{args.params[i].data, args.grads[i].data, args.numels[i], args.offsets[i], first_chunk};
      });
  add_up(launches, args.sums, 4, partials, args.numels);
  return launches;
}

Launches plan_combine(const Combination& args, double* partials, const Device& device) {
  Launches launches = over_chunks(
      launch_with<CombineLaunch>(partials, args.numels, args.ratio), args.numels, device,
      [&](size_t i) { return "params_combine_" + name_of(args.grads[i].dtype); },
      [&](size_t i, int first_chunk) {
        return CombineTensor{args.firsts[i].data, args.grads[i].data, args.numels[i], first_chunk};
      });
  add_up(launches, args.sums, 3, partials, args.numels);
  return launches;
}

Launches plan_adamw(const AdamwStep& args, AdamwScalars<float>* scalars, const Device& device) {
  Launches launches;
  const int64_t tensors = int64_t(args.steps.size());
  for (int64_t first = 0; first < tensors; first += ScalarsLaunch::kMost) {
    ScalarsLaunch a{args.factor, args.finite, args.options, scalars + first, 0, {}};
    a.count = int(std::min<int64_t>(tensors - first, ScalarsLaunch::kMost));
    std::copy_n(args.steps.begin() + first, a.count, a.steps);
    const int64_t blocks = (a.count + kParamsThreads - 1) / kParamsThreads;
    launches.push_back(launch_of("params_scalars", blocks, kParamsThreads, 1, 0, a));
  }
  const Launches steps = over_chunks(
      launch_with<AdamwLaunch>(nullptr, args.numels, args.finite), args.numels, device,
      [&](size_t i) { return "params_adamw_" + name_of(args.params[i].dtype) + "_" + name_of(args.grads[i].dtype); },
      [&](size_t i, int first_chunk) {
        return AdamwTensor{args.params[i].data,
                           args.masters[i].data,
                           args.grads[i].data,
                           static_cast<float*>(args.exp_avgs[i].data),
                           static_cast<float*>(args.exp_avg_sqs[i].data),
                           scalars + i,
                           args.numels[i],
                           first_chunk};
      });
  launches.insert(launches.end(), steps.begin(), steps.end());
  return launches;
}

}  // namespace redit
