// Arguments of the advantages op, shared by its C++ and CUDA versions. N samples, K rewards.
#pragma once

#include <cstdint>

namespace redit {

enum class Scale { group, batch, none };
enum class Combine { sum_then_normalize, normalize_then_sum };

struct AdvantagesOut {  // (N,) each
  float *values, *group_mean, *group_std;
  bool* dead;
  float *dithered_mean, *dithered_std;
};

struct AdvantagesIn {
  const double* rewards;      // (N, K) contiguous; NaN or inf: unscored
  const int64_t* groups;      // (N,) dense group index in order of first appearance
  const int64_t* sample_ids;  // (N,)
  const double* weights;      // (K,)
  const double* half_range;   // (K,), or null: no dither
  int64_t samples, reward_count;
};

struct AdvantagesOptions {
  bool gaussian, dither_alive, dither_dead, center_only, leave_one_out;
  Scale scale;
  Combine combine;
  uint64_t seed;
  uint32_t step;
  double eps;
  int ddof;
};

void group_advantages(const AdvantagesOut& out, const AdvantagesIn& in, const AdvantagesOptions& options, int threads);

}  // namespace redit
