// What the plan of the advantages hands to their kernels.
#pragma once

#include "cuda/launch.h"
#include "shared/args.h"

namespace redit {

constexpr int kMostRewards = 128;  // their weights and ranges travel in the launch
constexpr int kBatchBlock = 1024;  // groups per partial sum of a batch-wide sum
constexpr int kPeers = 8;
constexpr int kShared = 25088, kClusterShared = 86784;  // bytes of a block

struct Moments {
  double n, mean, std;
};

struct ColumnResult {  // of one reward in one group
  double mean, divisor;
  bool noisy, silent;
};

struct AdvantagesLaunch {
  AdvantagesOut out;
  AdvantagesIn in;
  AdvantageOptions options;
  double weights[kMostRewards], half_range[kMostRewards];  // copies: those of `in` are the host's
  bool dithered;
  // By ids: the samples sorted by group, in batch order within it, and the first place of each of `groups` + 1 groups;
  // further groups are empty. Null: groups of group_size consecutive samples.
  const int64_t *order, *starts;
  int64_t group_size, groups;
  int groups_per_block;
  ColumnResult* columns;  // (groups, K): room for normalize_then_sum
  // Room for the five launches: of each group a sum and its number of scored samples, and the batch's Moments.
  double *sums, *counts;
  Moments* batch;
};

// columns, sums, counts and batch of `args` may be null where nothing is normalised over the batch.
cuda::Launches plan_advantages(const AdvantagesLaunch& args, const cuda::Device& device);

}  // namespace redit
