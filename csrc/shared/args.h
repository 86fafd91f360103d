// What each op takes: one struct an op, which the binding fills and checks, and which the op reads. Where a comment
// names a Python file, the struct is a named tuple of that name there, field by field: a test compares them.
// N samples, K rewards, R rows.
#pragma once

#include <cstdint>
#include <vector>

#include "shared/dtype.h"

namespace redit {

struct Matrix {  // strides in elements; data null: absent
  void* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Advantages.

struct AdvantagesOut {  // (N,) each
  float *values, *group_mean, *group_std;
  bool* dead;
  float *dithered_mean, *dithered_std;
};

struct AdvantagesIn {
  const double* rewards;      // (N, K) contiguous; NaN or inf: unscored
  const int64_t* groups;      // (N,) dense group index in order of first appearance; null: group_size each
  const int64_t* sample_ids;  // (N,); null: 0 to N - 1
  const double* weights;      // (K,)
  const double* half_range;   // (K,), or null: no dither
  int64_t samples, reward_count;
};

REDIT_CHOICE(Distribution, uniform, gaussian)
REDIT_CHOICE(DeadGroups, apply, skip, center_only, only)
REDIT_CHOICE(Baseline, mean, leave_one_out)
REDIT_CHOICE(Scale, group, batch, none)
REDIT_CHOICE(Combine, sum_then_normalize, normalize_then_sum)

struct AdvantageOptions {  // of redit_fast/backends/args.py
  Distribution distribution;
  uint64_t seed;
  uint32_t step;
  DeadGroups dead_groups;
  Baseline baseline;
  Scale scale;
  Combine combine;
  double eps;
  int ddof;
};

struct GroupAdvantages {
  AdvantagesOut out;
  AdvantagesIn in;
  AdvantageOptions options;
};

// Token losses and the head.

struct TransformConstants {  // of redit_fast/losses/transforms.py
  double slope;
  float inner, outer;
  bool capped;
};

struct Logits {  // (R, V) of `type`, float32, bfloat16 or float16
  Matrix matrix;
  Dtype type;
  const int64_t* targets;  // (R,)
};

struct RowResults {  // (R,); entropy null: not asked for; sums (3, R): the anchor, sum_{j != t} e_j and sum_j e_j
  float *logp, *entropy;
  Matrix sums;
};

struct RowUpstream {  // what RowResults kept, and the upstream gradients (R,); without grad_entropy no entropy is read
  Matrix sums;
  const float *grad_logp, *grad_entropy, *entropy;
};

struct TokenLogp {
  RowResults out;
  Logits logits;
};

struct TokenLogpGrad {
  Matrix grad;  // of the logits' type; the logits themselves, or apart from them
  Logits logits;
  RowUpstream upstream;
};

REDIT_CHOICE(LossForm, clipped, cispo, sapo, reinforce, dppo_tv, dppo_kl, dro)
REDIT_CHOICE(Kl, k1, k2, k3, abs)
REDIT_CHOICE(TokenCorrection, none, token_truncate, token_mask)

struct PolicyConstants {  // of redit_fast/losses/coefficients.py
  LossForm form;
  Kl kl;
  bool kl_ratio_correction;
  TokenCorrection correction;
  float low, high, delta, dual_clip;
  float sapo_temperature_pos, sapo_temperature_neg, dro_beta, beta;
  float correction_floor, correction_cap;
};

struct LossRows {  // (R,); old_logp null: on policy; ref_logp null: no KL; sampling_logp null: no correction
  const float *weights, *advantages, *old_logp, *ref_logp, *sampling_logp;
};

struct TokenLoss {
  float *loss, *logp, *entropy;  // (), (R,), (R,)
  Matrix grad;                   // as in TokenLogpGrad, or absent
  Logits logits;
  LossRows rows;
  PolicyConstants policy;
  const float* grad_scale;  // null: 1
};

struct Head {  // (R, D), (V, D) and (1, V) or absent, of one `type`
  Matrix hidden, weight, bias;
  Dtype type;
};

// Passes over parameters: lists of contiguous tensors, their elements counted by numels. What a step computes lies
// where the tensors do, so that nobody waits for it: a pointer to one number.

struct Array {
  void* data;  // null: absent
  Dtype dtype;
};

using Arrays = std::vector<Array>;
using Sizes = std::vector<int64_t>;

struct SquaredNorm {
  double* out;
  Arrays tensors;
  Sizes numels;
};

REDIT_CHOICE(Rounding, stochastic, nearest)

struct PerturbOptions {  // of redit_fast/backends/args.py
  double grad_factor;
  Rounding rounding;
  uint64_t seed;
  int compute_dtype;  // a Dtype, or -1: each parameter's own
};

struct Perturbation {
  double* sums;  // <applied, intended>, |applied|^2, |intended|^2, number moved
  const double* scale;
  const int64_t* step;  // in [0, 2^32)
  Arrays params, grads;
  Sizes numels, offsets;  // offsets: each tensor's first element in the concatenation of all trainable parameters
  PerturbOptions options;
};

struct Combination {
  double* sums;          // |old grads|^2, |old grads - firsts|^2, |grads|^2
  Arrays firsts, grads;  // of equal dtypes
  Sizes numels;
  double ratio;
};

struct AdamwOptions {  // of redit_fast/backends/args.py
  double lr, beta1, beta2, eps, weight_decay;
};

struct AdamwStep {
  Arrays params, masters, grads, exp_avgs, exp_avg_sqs;
  std::vector<float*> steps;
  Sizes numels;
  const double* factor;  // of the gradients
  const bool* finite;    // else nothing changes but params, which become their masters again
  AdamwOptions options;
};

}  // namespace redit
