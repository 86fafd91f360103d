// Passes over parameters: arguments are tables of contiguous tensors. level: see rows.h.
#pragma once

#include <cstdint>
#include <vector>

#include "formats.h"

namespace redit {

struct Array {
  void* data;  // null: absent
  Dtype dtype;
};

using Arrays = std::vector<Array>;
using Sizes = std::vector<int64_t>;

// Sum of squares over all tensors.
double squared_norm(const Arrays& tensors, const Sizes& numels, int threads, int level);

struct PerturbOptions {
  double scale, grad_factor;
  bool stochastic;
  uint64_t seed;
  uint32_t step;
  int compute_dtype;  // a Dtype, or -1: each parameter's own
};

// params += scale * grads, then grads *= grad_factor; sums[4] = <applied, intended>, |applied|^2, |intended|^2, number
// moved. offsets: each tensor's first element in the concatenation of all trainable parameters.
void perturb(double (&sums)[4], const Arrays& params, const Arrays& grads, const Sizes& numels, const Sizes& offsets,
             const PerturbOptions& options, int threads, int level);

// grads = (1 - ratio) * firsts + ratio * grads, of equal dtypes; sums[3] = |old grads|^2, |old grads - firsts|^2,
// |grads|^2.
void combine(double (&sums)[3], const Arrays& firsts, const Arrays& grads, const Sizes& numels, double ratio, int threads,
             int level);

struct AdamwTable {
  Arrays params, masters, grads, exp_avgs, exp_avg_sqs;
  std::vector<float*> steps;
  Sizes numels;
};

struct AdamwOptions {
  double factor;
  bool finite;
  double lr, beta1, beta2, eps, weight_decay;
};

// One AdamW step on the master where there is one, then params = nearest(master). Not finite: only the latter.
void adamw(const AdamwTable& table, const AdamwOptions& options, int threads, int level);

}  // namespace redit
