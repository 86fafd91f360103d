// Dithered group advantages; redit_fast/backends/reference/advantages.py is the definition, bit for bit.
//
// float64 inside: members of a group are summed in batch order, the variance takes two passes, batch-wide sums add the
// group sums in order of first appearance in blocks of 1024 and then the blocks; one rounding to float32 at the store.
// Groups are independent, so the bits do not depend on the number of threads. Memory: reads 8 K bytes a sample, writes
// 21, and with dithering 8 K for the noise, which is made first: many numbers at a time.

#include "advantages.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "shared/element.h"

namespace redit {
namespace {

#define REDIT_KERNELS "noise_rows.h"
#include "levels.h"

constexpr double kDeadSpread = 1e-6;
constexpr int64_t kBatchBlock = 1024;        // groups per partial sum of a batch-wide sum
constexpr int64_t kSamplesPerThread = 2048;  // at least 20 us of work; forking a team costs 5 to 10

struct Rows {            // the samples of one group, in batch order
  const int64_t* order;  // null: neighbours
  int64_t first, count;
  int64_t operator[](int64_t j) const { return order ? order[first + j] : first + j; }
};

struct Groups {
  int64_t group_size, count, largest;
  std::vector<int64_t> order, offset;  // of groups by index

  // Rows of every group by a counting sort, which keeps batch order within a group.
  Groups(const int64_t* index, int64_t group_size, int64_t samples) : group_size(group_size) {
    if (!index) {
      count = samples / group_size, largest = group_size;
      return;
    }
    count = *std::max_element(index, index + samples) + 1, largest = 0;
    order.resize(samples), offset.resize(count + 1);
    for (int64_t i = 0; i < samples; ++i) ++offset[index[i] + 1];
    for (int64_t g = 0; g < count; ++g) {
      largest = std::max(largest, offset[g + 1]);
      offset[g + 1] += offset[g];
    }
    std::vector<int64_t> next(offset.begin(), offset.end() - 1);
    for (int64_t i = 0; i < samples; ++i) order[next[index[i]]++] = i;
  }
  Rows rows(int64_t g) const {
    if (order.empty()) return {nullptr, g * group_size, group_size};
    return {order.data(), offset[g], offset[g + 1] - offset[g]};
  }
};

struct Moments {
  double n, mean, std;
};

double deviation(double squares, double n, int ddof) {
  return n > ddof ? std::sqrt(squares / std::max(n - ddof, 1.0)) : 0.0;
}

double quotient(double x, double divisor) { return divisor > 0 ? x / divisor : 0.0; }

Moments moments(const double* x, const bool* scored, int64_t count, int ddof) {
  double n = 0, sum = 0, squares = 0;
  for (int64_t j = 0; j < count; ++j)
    if (scored[j]) n += 1, sum += x[j];
  const double mean = sum / std::max(n, 1.0);
  for (int64_t j = 0; j < count; ++j)
    if (scored[j]) squares += (x[j] - mean) * (x[j] - mean);
  return {n, mean, deviation(squares, n, ddof)};
}

bool equal_rewards(const double* x, const bool* scored, int64_t count, const Moments& clean) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (int64_t j = 0; j < count; ++j)
    if (scored[j]) low = std::min(low, x[j]), high = std::max(high, x[j]);
  // An overflowed sum (NaN) makes the mean NaN and the comparison false: not dead.
  return clean.n < 2 || high - low <= kDeadSpread * std::max(std::fabs(clean.mean), 1.0);
}

struct Scratch {  // of one group
  std::vector<double> clean, dithered, column, advantage;
  std::unique_ptr<bool[]> any_scored, scored;
  explicit Scratch(int64_t n)
      : clean(n), dithered(n), column(n), advantage(n), any_scored(new bool[n]), scored(new bool[n]) {}
};

template <class Body>
void for_each_group(const Groups& groups, int threads, Body body) {
  std::vector<Scratch> scratch;  // made here: no exception leaves a parallel region
  for (int thread = 0; thread < threads; ++thread) scratch.emplace_back(groups.largest);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t end = groups.count * (thread + 1) / threads;
    for (int64_t g = groups.count * thread / threads; g < end; ++g) body(g, groups.rows(g), scratch[thread]);
  }
}

// (K, N)
std::unique_ptr<double[]> noise_of(const AdvantagesIn& in, const AdvantageOptions& options, int threads, int level) {
  constexpr int64_t share = 256;
  const int64_t shares = (in.samples + share - 1) / share;
  std::unique_ptr<double[]> xi(new double[in.reward_count * in.samples]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < shares; ++s) {
    const int64_t first = s * share, count = std::min(share, in.samples - first);
    int64_t own[share];
    for (int64_t i = 0; i < count; ++i) own[i] = in.sample_ids ? in.sample_ids[first + i] : first + i;
    for (int64_t k = 0; k < in.reward_count; ++k)
      kernels(level)(&xi[k * in.samples + first], own, count, in.half_range[k], uint32_t(k), options);
  }
  return xi;
}

// What a division by the batch's deviation needs of all groups.
struct Batch {
  std::vector<double> advantage, normalized;  // (N,); the second is what mean and deviation are of
  std::unique_ptr<bool[]> scored;             // (N,)
  std::vector<char> silent, dead;             // by group

  Batch(int64_t samples, int64_t groups)
      : advantage(samples), normalized(samples), scored(new bool[samples]), silent(groups), dead(groups) {}

  template <class Term>
  double sum(const Groups& groups, Term term) const {
    double total = 0;
    for (int64_t first = 0; first < groups.count; first += kBatchBlock) {
      double partial = 0;
      for (int64_t g = first; g < std::min(first + kBatchBlock, groups.count); ++g) {
        const Rows rows = groups.rows(g);
        double sum = 0;
        for (int64_t j = 0; j < rows.count; ++j)
          if (scored[rows[j]]) sum += term(normalized[rows[j]]);
        partial += sum;
      }
      total += partial;
    }
    return total;
  }

  Moments moments(const Groups& groups, int ddof) const {
    const double n = double(std::count(scored.get(), scored.get() + normalized.size(), true));
    const double mean = sum(groups, [](double x) { return x; }) / std::max(n, 1.0);
    const double squares = sum(groups, [&](double x) { return (x - mean) * (x - mean); });
    return {n, mean, deviation(squares, n, ddof)};
  }
};

}  // namespace

void group_advantages(const GroupAdvantages& args, int64_t group_size, const Processor& processor) {
  const AdvantagesOut& out = args.out;
  const AdvantagesIn& in = args.in;
  const AdvantageOptions& options = args.options;
  const int64_t samples = in.samples, K = in.reward_count;
  if (samples == 0) return;
  const int threads = int(std::clamp<int64_t>(samples / kSamplesPerThread, 1, processor.threads));
  const Groups groups(in.groups, group_size, samples);
  const auto xi = in.half_range ? noise_of(in, options, threads, processor.level) : nullptr;
  const bool gdpo = options.combine == Combine::normalize_then_sum;
  const bool whole = gdpo || options.scale == Scale::batch;
  Batch batch(whole ? samples : 0, whole ? groups.count : 0);

  const auto reward = [&](int64_t i, int64_t k) { return in.rewards[i * K + k]; };
  const auto gets_noise = [&](bool is_dead) {
    return xi && options.dead_groups != (is_dead ? DeadGroups::skip : DeadGroups::only);
  };
  const auto divisor = [&](double std, bool is_dead) {
    return options.dead_groups == DeadGroups::center_only && is_dead ? 1.0 : std + options.eps;
  };

  for_each_group(groups, threads, [&](int64_t g, Rows rows, Scratch& own) {
    const int64_t count = rows.count;
    const bool* scored = own.any_scored.get();
    const auto of_group = [&](const std::vector<double>& x) { return moments(x.data(), scored, count, options.ddof); };
    for (int64_t j = 0; j < count; ++j) {
      double sum = 0;
      bool any = false;
      for (int64_t k = 0; k < K; ++k)
        if (std::isfinite(reward(rows[j], k))) any = true, sum += in.weights[k] * reward(rows[j], k);
      own.clean[j] = sum, own.any_scored[j] = any;
    }
    const Moments before = of_group(own.clean);
    Moments after = before;
    bool dead, silent;
    if (!gdpo) {
      dead = equal_rewards(own.clean.data(), scored, count, before);
      const bool noisy = gets_noise(dead);
      if (noisy) {
        for (int64_t j = 0; j < count; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < K; ++k)
            if (std::isfinite(reward(rows[j], k)))
              sum += in.weights[k] * (reward(rows[j], k) + xi[k * samples + rows[j]]);
          own.dithered[j] = sum;
        }
        after = of_group(own.dithered);
      }
      const double* dithered = (noisy ? own.dithered : own.clean).data();
      silent = before.n < 2 || (dead && !noisy);
      for (int64_t j = 0; j < count; ++j) {
        double a = dithered[j] - after.mean;
        if (options.baseline == Baseline::leave_one_out) a = a * before.n / std::max(before.n - 1, 1.0);
        own.advantage[j] = options.scale == Scale::group ? quotient(a, divisor(after.std, dead)) : a;
      }
      if (whole)
        for (int64_t j = 0; j < count; ++j) batch.normalized[rows[j]] = dithered[j];
    } else {  // GDPO: every reward normalised within its group, then summed; the batch normalises the sum below
      dead = silent = true;
      std::fill_n(own.advantage.begin(), count, 0.0);
      std::fill_n(own.dithered.begin(), count, 0.0);
      for (int64_t k = 0; k < K; ++k) {
        const auto of_column = [&] { return moments(own.column.data(), own.scored.get(), count, options.ddof); };
        for (int64_t j = 0; j < count; ++j) {
          own.column[j] = reward(rows[j], k);
          own.scored[j] = std::isfinite(own.column[j]);
        }
        const Moments clean_k = of_column();
        const bool dead_k = equal_rewards(own.column.data(), own.scored.get(), count, clean_k);
        const bool noisy = gets_noise(dead_k), silent_k = clean_k.n < 2 || (dead_k && !noisy);
        if (noisy)
          for (int64_t j = 0; j < count; ++j) own.column[j] += xi[k * samples + rows[j]];
        const Moments noisy_k = of_column();
        for (int64_t j = 0; j < count; ++j)
          if (own.scored[j]) {
            const double z = quotient(own.column[j] - noisy_k.mean, divisor(noisy_k.std, dead_k));
            own.advantage[j] += in.weights[k] * (silent_k ? 0.0 : z);
            own.dithered[j] += in.weights[k] * own.column[j];
          }
        dead = dead && dead_k;
        silent = silent && silent_k;
      }
      after = of_group(own.dithered);
      for (int64_t j = 0; j < count; ++j) batch.normalized[rows[j]] = own.advantage[j];
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = rows[j];
      out.values[i] = scored[j] && !silent ? float(own.advantage[j]) : 0.0f;
      out.group_mean[i] = float(before.mean);
      out.group_std[i] = float(before.std);
      out.dead[i] = dead;
      out.dithered_mean[i] = float(after.mean);
      out.dithered_std[i] = float(after.std);
      if (whole) batch.advantage[i] = own.advantage[j], batch.scored[i] = scored[j];
    }
    if (whole) batch.silent[g] = silent, batch.dead[g] = dead;
  });
  if (!whole) return;

  const Moments all = batch.moments(groups, options.ddof);
  for_each_group(groups, threads, [&](int64_t g, Rows rows, Scratch&) {
    for (int64_t j = 0; j < rows.count; ++j) {
      const int64_t i = rows[j];
      const double a = gdpo ? quotient(batch.advantage[i] - all.mean, all.std + options.eps)
                            : quotient(batch.advantage[i], divisor(all.std, batch.dead[g]));
      out.values[i] = batch.scored[i] && !batch.silent[g] ? float(a) : 0.0f;
    }
  });
}

}  // namespace redit
