// Dithered group advantages; redit_fast/backends/reference/advantages.py is the definition, bit for bit.
//
// float64 inside: members of a group are summed in batch order, the variance takes two passes, batch-wide sums add the
// group sums in order of first appearance in blocks of 1024 and then the blocks; one rounding to float32 at the store.
// Groups are independent, so the bits do not depend on the number of threads. Memory: reads 8 K + 16 bytes a sample,
// writes 21.

#include "advantages.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "shared/element.h"

namespace redit {
namespace {

constexpr double kDeadSpread = 1e-6;
constexpr int64_t kBatchBlock = 1024;       // groups per partial sum of a batch-wide sum
constexpr int64_t kSamplesPerThread = 512;  // about 25 us of work; forking a team costs 5 to 10

struct Rows {  // the samples of one group, in batch order
  const int64_t *first, *last;
  const int64_t* begin() const { return first; }
  const int64_t* end() const { return last; }
};

// Rows of every group by a counting sort, which keeps batch order within a group.
struct Groups {
  std::vector<int64_t> offset, order;

  Groups(const int64_t* index, int64_t samples) : order(samples) {
    offset.resize(*std::max_element(index, index + samples) + 2);
    for (int64_t i = 0; i < samples; ++i) ++offset[index[i] + 1];
    for (size_t g = 1; g < offset.size(); ++g) offset[g] += offset[g - 1];
    std::vector<int64_t> next(offset.begin(), offset.end() - 1);
    for (int64_t i = 0; i < samples; ++i) order[next[index[i]]++] = i;
  }
  int64_t count() const { return int64_t(offset.size()) - 1; }
  Rows rows(int64_t g) const { return {order.data() + offset[g], order.data() + offset[g + 1]}; }
};

struct Moments {
  double n, mean, std;
};

double deviation(double squares, double n, int ddof) {
  return n > ddof ? std::sqrt(squares / std::max(n - ddof, 1.0)) : 0.0;
}

double quotient(double x, double divisor) { return divisor > 0 ? x / divisor : 0.0; }

template <class Scored, class Value>
Moments moments(Rows rows, int ddof, Scored scored, Value value) {
  double n = 0, sum = 0, squares = 0;
  for (int64_t i : rows)
    if (scored(i)) n += 1, sum += value(i);
  const double mean = sum / std::max(n, 1.0);
  for (int64_t i : rows)
    if (scored(i)) squares += (value(i) - mean) * (value(i) - mean);
  return {n, mean, deviation(squares, n, ddof)};
}

template <class Scored, class Value>
bool equal_rewards(Rows rows, Moments clean, Scored scored, Value value) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (int64_t i : rows)
    if (scored(i)) low = std::min(low, value(i)), high = std::max(high, value(i));
  // An overflowed sum (NaN) makes the mean NaN and the comparison false: not dead.
  return clean.n < 2 || high - low <= kDeadSpread * std::max(std::fabs(clean.mean), 1.0);
}

template <class Body>
void for_each_group(const Groups& groups, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups.count(); ++g) body(g, groups.rows(g));
}

}  // namespace

void group_advantages(const GroupAdvantages& args, int threads) {
  const AdvantagesOut& out = args.out;
  const AdvantagesIn& in = args.in;
  const AdvantageOptions& options = args.options;
  const int64_t samples = in.samples, K = in.reward_count;
  if (samples == 0) return;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, samples / kSamplesPerThread)));
  const Groups groups(in.groups, samples);
  std::vector<char> any_scored(samples), silent(groups.count()), dead(groups.count());
  std::vector<double> clean(samples), dithered(samples), column(samples), advantage(samples);

  const bool gaussian = options.distribution == Distribution::gaussian;
  const auto reward = [&](int64_t i, int64_t k) { return in.rewards[i * K + k]; };
  const auto sample_scored = [&](int64_t i) { return bool(any_scored[i]); };
  const auto gets_noise = [&](bool is_dead) {
    return in.half_range && options.dead_groups != (is_dead ? DeadGroups::skip : DeadGroups::only);
  };
  const auto dithered_reward = [&](int64_t i, int64_t k, bool noisy) {
    if (!noisy) return reward(i, k);
    return reward(i, k) + noise(gaussian, in.half_range[k], options.seed, in.sample_ids[i], uint32_t(k), options.step);
  };
  const auto divisor = [&](double std, bool is_dead) {
    return options.dead_groups == DeadGroups::center_only && is_dead ? 1.0 : std + options.eps;
  };

  for_each_group(groups, threads, [&](int64_t g, Rows rows) {
    for (int64_t i : rows) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k)
        if (std::isfinite(reward(i, k))) any_scored[i] = 1, sum += in.weights[k] * reward(i, k);
      clean[i] = sum;
    }
    const auto clean_value = [&](int64_t i) { return clean[i]; };
    const auto dithered_value = [&](int64_t i) { return dithered[i]; };
    const Moments before = moments(rows, options.ddof, sample_scored, clean_value);
    Moments after;
    if (options.combine == Combine::sum_then_normalize) {
      dead[g] = equal_rewards(rows, before, sample_scored, clean_value);
      const bool noisy = gets_noise(dead[g]);
      for (int64_t i : rows)
        for (int64_t k = 0; k < K; ++k)
          if (std::isfinite(reward(i, k))) dithered[i] += in.weights[k] * dithered_reward(i, k, noisy);
      after = moments(rows, options.ddof, sample_scored, dithered_value);
      silent[g] = before.n < 2 || (dead[g] && !noisy);
      for (int64_t i : rows) {
        double a = dithered[i] - after.mean;
        if (options.baseline == Baseline::leave_one_out) a = a * before.n / std::max(before.n - 1, 1.0);
        advantage[i] = options.scale == Scale::group ? quotient(a, divisor(after.std, dead[g])) : a;
      }
    } else {  // GDPO: every reward normalised within its group, then summed; the batch normalises the sum below
      dead[g] = silent[g] = 1;
      for (int64_t k = 0; k < K; ++k) {
        const auto scored = [&](int64_t i) { return std::isfinite(reward(i, k)); };
        const auto clean_column = [&](int64_t i) { return reward(i, k); };
        const Moments clean_k = moments(rows, options.ddof, scored, clean_column);
        const bool dead_k = equal_rewards(rows, clean_k, scored, clean_column), noisy = gets_noise(dead_k);
        for (int64_t i : rows)
          if (scored(i)) column[i] = dithered_reward(i, k, noisy);
        const Moments noisy_k = moments(rows, options.ddof, scored, [&](int64_t i) { return column[i]; });
        const bool silent_k = clean_k.n < 2 || (dead_k && !noisy);
        for (int64_t i : rows)
          if (scored(i)) {
            const double z = quotient(column[i] - noisy_k.mean, divisor(noisy_k.std, dead_k));
            advantage[i] += in.weights[k] * (silent_k ? 0.0 : z);
            dithered[i] += in.weights[k] * column[i];
          }
        dead[g] = dead[g] && dead_k;
        silent[g] = silent[g] && silent_k;
      }
      after = moments(rows, options.ddof, sample_scored, dithered_value);
    }
    for (int64_t i : rows) {
      out.group_mean[i] = float(before.mean);
      out.group_std[i] = float(before.std);
      out.dead[i] = bool(dead[g]);
      out.dithered_mean[i] = float(after.mean);
      out.dithered_std[i] = float(after.std);
    }
  });

  const bool gdpo = options.combine == Combine::normalize_then_sum;
  Moments batch{0, 0, 0};
  if (gdpo || options.scale == Scale::batch) {
    std::vector<double> group_sums(groups.count());
    const auto batch_sum = [&](auto term) {
      for_each_group(groups, threads, [&](int64_t g, Rows rows) {
        double sum = 0;
        for (int64_t i : rows)
          if (any_scored[i]) sum += term(i);
        group_sums[g] = sum;
      });
      double total = 0;
      for (int64_t first = 0; first < groups.count(); first += kBatchBlock) {
        double partial = 0;
        for (int64_t g = first; g < std::min(first + kBatchBlock, groups.count()); ++g) partial += group_sums[g];
        total += partial;
      }
      return total;
    };
    const std::vector<double>& x = gdpo ? advantage : dithered;
    batch.n = double(std::count(any_scored.begin(), any_scored.end(), 1));
    batch.mean = batch_sum([&](int64_t i) { return x[i]; }) / std::max(batch.n, 1.0);
    const double squares = batch_sum([&](int64_t i) { return (x[i] - batch.mean) * (x[i] - batch.mean); });
    batch.std = deviation(squares, batch.n, options.ddof);
  }
  for_each_group(groups, threads, [&](int64_t g, Rows rows) {
    for (int64_t i : rows) {
      double a = advantage[i];
      if (gdpo)
        a = quotient(a - batch.mean, batch.std + options.eps);
      else if (options.scale == Scale::batch)
        a = quotient(a, divisor(batch.std, dead[g]));
      out.values[i] = any_scored[i] && !silent[g] ? float(a) : 0.0f;
    }
  });
}

}  // namespace redit
