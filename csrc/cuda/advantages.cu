// Dithered group advantages; redit_fast/backends/reference/advantages.py is the definition, bit for bit.
//
//   A = (r~ - mean) / (std + eps), r~ = sum_k weight_k (reward_k + xi_k)      reads 8 K + 8 bytes a sample, writes 21
//
// Compile with -fmad=false: a fused multiply-add would change the bits. A block takes consecutive groups. Each of its
// threads makes the noise of a sample, a tile of as many samples as threads at a time, and adds up a group in batch
// order. What a thread needs of other samples lies in shared memory; a tile is made again when it comes up again, so
// that nothing of a sample goes through global memory, and once only where one tile has all of the block's samples.
// What is normalised over the batch is one cluster of 8 blocks of 1024 groups, in the order of sums that the reference
// has, up to 8192 samples; else five launches: sums, mean, squares, std, values.
//
//   kernel   threads  groups a block  shared bytes  registers: sm_80  sm_90a  sm_100
//   whole        256       up to 256         25088             74      68      87
//   sums         256       up to 256         25088             85      80      94
//   squares      256       up to 256         25088             87      82      96
//   values       256       up to 256         25088             87      82      96
//   cluster      512      up to 1024         86784              -      81      92
//   mean        1024               -             0             40      40      63
//   std         1024               -             0             40      40      63

#include <cmath>

#include "cuda/advantages.h"
#include "cuda/device.h"
#include "shared/element.h"

namespace redit {

namespace {

constexpr double kDeadSpread = 1e-6, kInfinity = __builtin_huge_val();

// What a launch does with its groups: everything; everything within a cluster that has the whole batch; or one of the
// launches that go over the batch together.
enum class Part { whole, cluster, sums, squares, values };
constexpr int kWeightedSums = -1;  // the tile that is no column of rewards

REDIT_DEVICE double at_least_one(double x) { return x < 1.0 ? 1.0 : x; }  // NaN stays
REDIT_DEVICE double quotient(double x, double divisor) { return divisor > 0 ? x / divisor : 0.0; }
REDIT_DEVICE double deviation(double squares, double n, int ddof) {
  return n > ddof ? std::sqrt(squares / at_least_one(n - ddof)) : 0.0;
}

struct GroupState {
  double scored, mean, std, noisy_mean, noisy_std;
  double sum, low, high;  // of the pass
  bool dead, noisy, silent, all_dead, all_silent;
};

template <int kThreads, int kGroups>
struct Room {
  double clean[kThreads], dithered[kThreads], normalized[kThreads];  // of the tile's samples
  GroupState groups[kGroups];                                        // of the block's groups
  double peers[2][kPeers][2];  // by turn: of each block of the cluster its sum and its number of scored samples
  bool scored[kThreads];
};

// Passes over the block's samples. Of a column of rewards only the first three.
enum Pass { kSum, kSquares, kNoisySquares, kBatchSum, kBatchSquares, kWrite, kPasses };

// A thread is a sample of the tile, and has one group or, where there are more groups than threads, several.
template <Part part, int kThreads, int kGroups>
struct Block {
  const AdvantagesLaunch& a;
  Room<kThreads, kGroups>& room;
  const int t;
  const bool gdpo;
  int64_t first_group, begin, end;  // places of the block's samples
  int groups;
  int64_t tile = -1;
  int tile_column = 0;
  double batch_mean = 0, batch_std = 0;

  REDIT_DEVICE Block(const AdvantagesLaunch& launch, Room<kThreads, kGroups>& shared)
      : a(launch),
        room(shared),
        t(int(threadIdx.x)),
        gdpo(part != Part::whole && a.options.combine == Combine::normalize_then_sum),
        first_group(int64_t(blockIdx.x) * launch.groups_per_block) {
    const int64_t left = a.groups - first_group;
    groups = int(left < 0 ? 0 : left < a.groups_per_block ? left : a.groups_per_block);
    begin = groups ? place_of(first_group) : 0;
    end = groups ? place_of(first_group + groups) : 0;
    for (int g = t; g < groups; g += kThreads) room.groups[g].all_dead = room.groups[g].all_silent = true;
  }

  REDIT_DEVICE int64_t place_of(int64_t group) const {
    if (a.starts) return a.starts[group];
    const int64_t place = group * a.group_size;
    return place < a.in.samples ? place : a.in.samples;
  }
  REDIT_DEVICE int64_t sample_at(int64_t place) const { return a.order ? a.order[place] : place; }
  REDIT_DEVICE int group_at(int64_t place) const {  // among the block's
    return int(a.order ? a.in.groups[a.order[place]] - first_group : (place - begin) / a.group_size);
  }
  REDIT_DEVICE double divisor(double std, bool dead) const {
    return a.options.dead_groups == DeadGroups::center_only && dead ? 1.0 : std + a.options.eps;
  }

  // Into shared memory: the weighted sums of the tile's samples, or one column of their rewards.
  REDIT_DEVICE void make_tile(int64_t base, int column) {
    if (tile == base && tile_column == column) return;
    __syncthreads();
    tile = base, tile_column = column;
    const int64_t place = base + t;
    if (place < end) {
      const bool whole = column == kWeightedSums;
      const int64_t i = sample_at(place);
      const int K = int(a.in.reward_count);
      const int64_t id = a.in.sample_ids ? a.in.sample_ids[i] : i;
      const ColumnResult* results = whole && gdpo ? a.columns + (first_group + group_at(place)) * K : nullptr;
      double clean = 0, dithered = 0, normalized = 0;
      bool scored = false;
      for (int k = whole ? 0 : column; k < (whole ? K : column + 1); ++k) {
        const double reward = a.in.rewards[i * K + k], weight = whole ? a.weights[k] : 1.0;
        if (!(std::fabs(reward) < kInfinity)) continue;
        double x = reward;
        if (a.dithered && (!results || results[k].noisy)) {
          const Words words = philox4x32(a.options.seed, id, uint32_t(k), a.options.step);
          x = reward + noise(a.options.distribution == Distribution::gaussian, a.half_range[k], words.x0, words.x1);
        }
        scored = true;
        clean += weight * reward;
        dithered += weight * x;
        if (results)
          normalized += weight * (results[k].silent ? 0.0 : quotient(x - results[k].mean, results[k].divisor));
      }
      room.clean[t] = clean, room.dithered[t] = dithered, room.normalized[t] = normalized, room.scored[t] = scored;
    }
    __syncthreads();
  }

  // Sample j of the tile: what is normalised by its group or by the batch.
  REDIT_DEVICE double value(const GroupState& group, int j) const {
    return gdpo ? room.normalized[j] : group.noisy ? room.dithered[j] : room.clean[j];
  }

  REDIT_DEVICE void add(Pass pass, GroupState& own, int j) {
    if (!room.scored[j]) return;
    const double x = room.clean[j], y = own.noisy ? room.dithered[j] : x;
    if (pass == kSum) {
      own.scored += 1, own.sum += x;
      if (x < own.low) own.low = x;
      if (x > own.high) own.high = x;
    } else if (pass == kSquares) {
      own.sum += (x - own.mean) * (x - own.mean), own.noisy_mean += y;
    } else if (pass == kNoisySquares) {
      own.sum += (y - own.noisy_mean) * (y - own.noisy_mean);
    } else {
      const double z = value(own, j);
      own.sum += pass == kBatchSum ? z : (z - batch_mean) * (z - batch_mean);
    }
  }

  // After a pass over a column: what the next one needs of the sums of group g.
  REDIT_DEVICE void finish(Pass pass, int column, int g) {
    GroupState& own = room.groups[g];
    if (pass == kSum) {
      own.mean = own.sum / at_least_one(own.scored);
      // An overflowed sum (NaN) makes the mean NaN and the comparison false: not dead.
      own.dead = own.scored < 2 || own.high - own.low <= kDeadSpread * at_least_one(std::fabs(own.mean));
      own.noisy = a.dithered && a.options.dead_groups != (own.dead ? DeadGroups::skip : DeadGroups::only);
      own.silent = own.scored < 2 || (own.dead && !own.noisy);
      if (gdpo && column == kWeightedSums) own.dead = own.all_dead, own.silent = own.all_silent, own.noisy = true;
    } else if (pass == kSquares) {
      own.std = deviation(own.sum, own.scored, a.options.ddof);
      own.noisy_mean = own.noisy_mean / at_least_one(own.scored);
    } else if (pass == kNoisySquares) {
      own.noisy_std = deviation(own.sum, own.scored, a.options.ddof);
      if (column == kWeightedSums) return;
      own.all_dead = own.all_dead && own.dead, own.all_silent = own.all_silent && own.silent;
      a.columns[(first_group + g) * a.in.reward_count + column] = {own.noisy_mean, divisor(own.noisy_std, own.dead),
                                                                   own.noisy, own.silent};
    } else if (part != Part::cluster) {
      a.sums[first_group + g] = own.sum, a.counts[first_group + g] = own.scored;
    }
  }

  // Over the cluster: the number of scored samples, and in `mean` the sum of all groups' sums.
  REDIT_DEVICE Moments batch_sum(int turn) {
    __syncthreads();
    if (t < kPeers) {
      double partial = 0, scored = 0;
      for (int g = 0; g < groups; ++g) partial += room.groups[g].sum, scored += room.groups[g].scored;
      device::store_peer(&room.peers[turn][device::cluster_rank()][0], t, partial);
      device::store_peer(&room.peers[turn][device::cluster_rank()][1], t, scored);
    }
    device::sync_cluster();
    Moments total{};
    for (int r = 0; r < kPeers; ++r) total.mean += room.peers[turn][r][0], total.n += room.peers[turn][r][1];
    return total;
  }

  REDIT_DEVICE void write(int64_t place) const {
    if (place >= end) return;
    const int64_t i = sample_at(place);
    const GroupState& group = room.groups[group_at(place)];
    double x = value(group, t);
    if (gdpo) {
      x = quotient(x - batch_mean, batch_std + a.options.eps);
    } else {
      x = x - group.noisy_mean;
      if (a.options.baseline == Baseline::leave_one_out) x = x * group.scored / at_least_one(group.scored - 1);
      if (a.options.scale != Scale::none)
        x = quotient(x, divisor(a.options.scale == Scale::batch ? batch_std : group.noisy_std, group.dead));
    }
    a.out.values[i] = room.scored[t] && !group.silent ? float(x) : 0.0f;
    a.out.group_mean[i] = float(group.mean), a.out.group_std[i] = float(group.std);
    a.out.dead[i] = group.dead;
    a.out.dithered_mean[i] = float(group.noisy_mean), a.out.dithered_std[i] = float(group.noisy_std);
  }

  REDIT_DEVICE static bool takes_part(int pass) {
    return pass < kBatchSum || part == Part::cluster || (pass == kBatchSum && part == Part::sums) ||
           (pass == kBatchSquares && part == Part::squares) ||
           (pass == kWrite && (part == Part::whole || part == Part::values));
  }

  REDIT_DEVICE void run() {
    if (part == Part::squares || part == Part::values) batch_mean = a.batch->mean, batch_std = a.batch->std;
    int column = gdpo ? 0 : kWeightedSums;
    for (int pass = kSum; pass < kPasses; ++pass) {
      if (!takes_part(pass)) continue;
      for (int g = t; g < groups; g += kThreads) {
        GroupState& own = room.groups[g];
        own.sum = 0;
        if (pass == kSum) own.scored = own.noisy_mean = 0, own.low = kInfinity, own.high = -kInfinity;
      }
      for (int64_t base = begin; base < end; base += kThreads) {
        make_tile(base, column);
        if (pass == kWrite) {
          write(base + t);
          continue;
        }
        for (int g = t; g < groups; g += kThreads) {
          const int64_t first = place_of(first_group + g), last = place_of(first_group + g + 1);
          const int to = int(last < base + kThreads ? last - base : kThreads);
          for (int j = int(first > base ? first - base : 0); j < to; ++j) add(Pass(pass), room.groups[g], j);
        }
      }
      if (pass == kWrite) return;
      for (int g = t; g < groups; g += kThreads) finish(Pass(pass), column, g);
      if (part == Part::cluster && pass >= kBatchSum) {
        const Moments total = batch_sum(pass == kBatchSquares);
        if (pass == kBatchSum)
          batch_mean = total.mean / at_least_one(total.n);
        else
          batch_std = deviation(total.mean, total.n, a.options.ddof);
      }
      __syncthreads();
      if (pass == kNoisySquares && column != kWeightedSums) {
        column = column + 1 < a.in.reward_count ? column + 1 : kWeightedSums;
        pass = kSum - 1;
      }
    }
  }
};

template <Part part, int kThreads, int kGroups>
REDIT_DEVICE void advantages(const AdvantagesLaunch& a) {
  extern __shared__ __align__(16) unsigned char memory[];
  Block<part, kThreads, kGroups>(a, *reinterpret_cast<Room<kThreads, kGroups>*>(memory)).run();
}

// The batch's moments from the groups' sums: blocks of 1024 groups, then the blocks in order.
template <bool squares>
REDIT_DEVICE void add_groups(const AdvantagesLaunch& a) {
  __shared__ double partials[kBatchBlock], counts[kBatchBlock];
  const int t = int(threadIdx.x);
  double total = 0, n = 0;
  for (int64_t first = 0; first < a.groups; first += int64_t(kBatchBlock) * kBatchBlock) {
    double partial = 0, count = 0;
    const int64_t begin = first + int64_t(t) * kBatchBlock;
    for (int64_t g = begin; g < begin + kBatchBlock && g < a.groups; ++g) partial += a.sums[g], count += a.counts[g];
    partials[t] = partial, counts[t] = count;
    __syncthreads();
    for (int b = 0; t == 0 && b < kBatchBlock && first + int64_t(b) * kBatchBlock < a.groups; ++b)
      total += partials[b], n += counts[b];
    __syncthreads();
  }
  if (t != 0) return;
  if (squares)
    a.batch->std = deviation(total, n, a.options.ddof);
  else
    a.batch->n = n, a.batch->mean = total / at_least_one(n);
}

}  // namespace

#define REDIT_ADVANTAGES(part, threads, groups)                        \
  extern "C" __global__ void __launch_bounds__(threads, 512 / threads) \
      advantages_##part(const __grid_constant__ AdvantagesLaunch a) {  \
    advantages<Part::part, threads, groups>(a);                        \
  }
static_assert(sizeof(Room<256, 256>) == kShared && sizeof(Room<512, kBatchBlock>) == kClusterShared);
REDIT_ADVANTAGES(whole, 256, 256)
REDIT_ADVANTAGES(sums, 256, 256)
REDIT_ADVANTAGES(squares, 256, 256)
REDIT_ADVANTAGES(values, 256, 256)
#if REDIT_CLUSTERS_ARE_THERE
REDIT_ADVANTAGES(cluster, 512, kBatchBlock)
#else
extern "C" __global__ void __launch_bounds__(32) advantages_cluster(const __grid_constant__ AdvantagesLaunch) {}
#endif

// One block is all there is: it may take every register.
extern "C" __global__ void __launch_bounds__(kBatchBlock, 1)
    advantages_mean(const __grid_constant__ AdvantagesLaunch a) {
  add_groups<false>(a);
}
extern "C" __global__ void __launch_bounds__(kBatchBlock, 1)
    advantages_std(const __grid_constant__ AdvantagesLaunch a) {
  add_groups<true>(a);
}

cuda::Kernels cuda::advantages_kernels() {
  return {REDIT_KERNEL(advantages_whole),  REDIT_KERNEL(advantages_sums), REDIT_KERNEL(advantages_squares),
          REDIT_KERNEL(advantages_values), REDIT_KERNEL(advantages_mean), REDIT_KERNEL(advantages_std),
          REDIT_KERNEL(advantages_cluster)};
}

}  // namespace redit
