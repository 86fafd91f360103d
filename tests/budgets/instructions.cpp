// Runs every op of csrc/cpu once for each dtype and for the baseline and AVX2, and has callgrind write down how many
// instructions each took: valgrind --tool=callgrind --collect-atstart=no. Valgrind knows no AVX-512.

#include <valgrind/callgrind.h>

#include <string>

#include "cpu/advantages.h"
#include "cpu/formats.h"
#include "cpu/linear_loss.h"
#include "cpu/params.h"
#include "cpu/token_loss.h"

using namespace redit;

constexpr int64_t R = 4, V = 4099, D = 64, W = 40000, N = 512, K = 2;
const char* const kLevels[] = {"baseline", "avx2"};
const Dtype kLow[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
const char* const kNames[] = {"float32", "bfloat16", "float16"};

// Numbers between -2 and 2, of any dtype.
struct Values {
  Values(int64_t count, Dtype dtype, uint32_t seed = 1) : bytes(size_t(count * size_of(dtype))), dtype(dtype) {
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float x = float(seed >> 8) * 0x1p-22f - 2.0f;
      if (dtype == Dtype::float32)
        floats()[i] = x;
      else
        halves()[i] = dtype == Dtype::bfloat16 ? to_bfloat16(x) : to_float16(x);
    }
  }
  Array array() { return {bytes.data(), dtype}; }
  Matrix matrix(int64_t rows, int64_t columns) { return {bytes.data(), rows, columns, columns, 1}; }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
  uint16_t* halves() { return reinterpret_cast<uint16_t*>(bytes.data()); }

  std::vector<char> bytes;
  Dtype dtype;
};

template <class F>
void counted(const std::string& name, F run) {
  run();  // what is done once only
  CALLGRIND_ZERO_STATS;
  CALLGRIND_TOGGLE_COLLECT;
  run();
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

void rows_of_logits(int type, int level) {
  const Run run{kLow[type], {1.0, 1.0f, 1.44269504f, false}, 1, level};
  const std::string suffix = std::string(", ") + kNames[type] + ", " + kLevels[level];
  Values logits(R * V, run.type), out(R * V, run.type), tile(R * V, Dtype::float32), hidden(R * D, run.type),
      weight(V * D, run.type);
  std::vector<float> logp(R), entropy(R), upstream(R, 0.5f), sums(3 * R);
  const int64_t targets[R] = {5, 17, 4098, 1000};
  float loss = 0;
  const Logits x{logits.matrix(R, V), run.type, targets};
  const Matrix kept{sums.data(), 3, R, R, 1};
  const RowUpstream back{kept, upstream.data(), upstream.data(), entropy.data()};
  const LossRows rows{upstream.data(), upstream.data(), nullptr, nullptr, nullptr};
  PolicyConstants policy{};
  policy.low = 0.8f;
  policy.high = 1.2f;
  policy.delta = policy.dual_clip = __builtin_inff();
  counted("token_logp" + suffix, [&] { token_logp({{logp.data(), entropy.data(), kept}, x}, run); });
  counted("token_logp_grad" + suffix, [&] { token_logp_grad({out.matrix(R, V), x, back}, run); });
  counted("token_loss" + suffix,
          [&] { token_loss({&loss, logp.data(), entropy.data(), out.matrix(R, V), x, rows, policy, nullptr}, run); });
  counted("scale_in_place" + suffix, [&] { scale_in_place(out.matrix(R, V), 0.999f, run); });
  counted("exp_product's tile" + suffix, [&] {
    HeadRows head(targets, R, V);
    head.anchor_at_targets({hidden.matrix(R, D), weight.matrix(V, D), {}, run.type}, run);
    head.add(out.matrix(R, V), tile.matrix(R, V), 0, 0, run);
    head.repair(R);
    head.finish({logp.data(), entropy.data(), kept}, run.transform);
    head.store_targets(out.matrix(R, V), run);
  });
}

void passes_over_parameters(int type, int level) {
  const std::string suffix = std::string(", ") + kNames[type] + ", " + kLevels[level];
  const Dtype dtype = kLow[type];
  Values param(W, dtype), grad(W, dtype, 2), first(W, dtype, 3), master(W, Dtype::float32), m(W, Dtype::float32),
      v(W, Dtype::float32);
  for (int64_t i = 0; i < W; ++i) v.floats()[i] *= v.floats()[i];
  double norm = 0, sums[4] = {}, scale = 1e-3, factor = 1.0;
  const int64_t step = 5;
  float steps = 3;
  const bool finite = true;
  const Array masters = dtype == Dtype::float32 ? Array{nullptr, Dtype::float32} : master.array();
  counted("squared_norm" + suffix, [&] { squared_norm({&norm, {grad.array()}, {W}}, 1, level); });
  const PerturbOptions options{1.0, Rounding::stochastic, 7, -1};
  counted("perturb" + suffix,
          [&] { perturb({sums, &scale, &step, {param.array()}, {grad.array()}, {W}, {0}, options}, 1, level); });
  counted("combine" + suffix, [&] { combine({sums, {first.array()}, {grad.array()}, {W}, 0.5}, 1, level); });
  counted("adamw" + suffix, [&] {
    adamw({{param.array()},
           {masters},
           {grad.array()},
           {m.array()},
           {v.array()},
           {&steps},
           {W},
           &factor,
           &finite,
           {1e-3, 0.9, 0.999, 1e-8, 0.1}},
          1, level);
  });
}

void advantages(const std::string& noise, Distribution distribution, bool dithered, int level) {
  std::vector<double> rewards(N * K);
  for (int64_t i = 0; i < N * K; ++i) rewards[size_t(i)] = i % 5 > 2;
  const double weights[K] = {1.0, 0.3}, half_range[K] = {0.05, 0.2};
  float values[N], mean[N], deviation[N], dithered_mean[N], dithered_deviation[N];
  bool dead[N];
  const AdvantageOptions options{
      distribution, 7, 3, DeadGroups::apply, Baseline::mean, Scale::group, Combine::sum_then_normalize, 1e-4, 1};
  counted("group_advantages, " + noise + ", " + kLevels[level], [&] {
    group_advantages({{values, mean, deviation, dead, dithered_mean, dithered_deviation},
                      {rewards.data(), nullptr, nullptr, weights, dithered ? half_range : nullptr, N, K},
                      options},
                     8, {1, level});
  });
}

int main() {
  for (int level = 0; level < 2; ++level) {
    for (int type = 0; type < 3; ++type) {
      rows_of_logits(type, level);
      passes_over_parameters(type, level);
    }
    advantages("clean", Distribution::gaussian, false, level);
    advantages("gaussian", Distribution::gaussian, true, level);
    advantages("uniform", Distribution::uniform, true, level);
  }
}
