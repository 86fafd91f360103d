// The launches of the advantages; advantages.cu says which there are.

#include <algorithm>

#include "cuda/advantages.h"

namespace redit {

using cuda::launch_of, cuda::Launches;

Launches plan_advantages(const AdvantagesLaunch& args, const cuda::Device& device) {
  if (args.in.samples == 0) return {};
  const bool batch_wide = args.options.scale == Scale::batch || args.options.combine == Combine::normalize_then_sum;
  AdvantagesLaunch a = args;
  if (batch_wide && a.in.samples <= kPeers * kBatchBlock) {
    a.groups_per_block = kBatchBlock;
    const Launches cluster{launch_of("advantages_cluster", kPeers, 512, kPeers, kClusterShared, a)};
    if (cuda::resident_clusters(device, cluster[0]) > 0) return cluster;
  }
  a.groups_per_block = a.order ? 32 : int(std::max<int64_t>(1, 256 / a.group_size));
  const int64_t blocks = (a.groups + a.groups_per_block - 1) / a.groups_per_block;
  const auto over_groups = [&](const char* kernel) { return launch_of(kernel, blocks, 256, 1, kShared, a); };
  const auto over_sums = [&](const char* kernel) { return launch_of(kernel, 1, kBatchBlock, 1, 0, a); };
  if (!batch_wide) return {over_groups("advantages_whole")};
  return {over_groups("advantages_sums"), over_sums("advantages_mean"), over_groups("advantages_squares"),
          over_sums("advantages_std"), over_groups("advantages_values")};
}

}  // namespace redit
