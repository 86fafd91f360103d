// Prints a hash of every output for fixed inputs: the same on every processor. Without NaN,
// whose sign differs (x86 makes -NaN, ARM +NaN). test_compilers.py compiles and compares.

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/advantages.h"
#include "cpu/formats.h"
#include "cpu/token_loss.h"
#include "shared/element.h"

using namespace redit;

template <class T>
void print(const char* op, const char* output, const T* values, size_t count) {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < count * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001B3u;
  std::printf("%s %s %016" PRIx64 "\n", op, output, hash);
}

float normal(int64_t i, uint32_t stream) {
  const Words words = philox4x32(1, i, stream, 0);
  return float(box_muller(words.x0, words.x1));
}

void token_rows(const char* op, const Run& run) {
  constexpr int64_t R = 6, V = 4135;  // two chunks, the last block with 7 of its 32 columns
  const int64_t bytes = run.type == Dtype::float32 ? 4 : 2;
  std::vector<char> logits(R * V * bytes), grad(R * V * bytes);
  for (int64_t i = 0; i < R * V; ++i) {
    float x = normal(i, 0) * (i / V == 1 ? 80.0f : 4.0f);  // row 1 is redone with its largest logit as anchor
    if (i / V == 2 && i % 2) x = -__builtin_inff();
    if (i / V == 3) x *= 1e-5f;  // subnormal in float16
    const uint16_t half = run.type == Dtype::bfloat16 ? to_bfloat16(x) : to_float16(x);
    if (bytes == 4)
      std::memcpy(&logits[i * bytes], &x, 4);
    else
      std::memcpy(&logits[i * bytes], &half, 2);
  }
  const int64_t targets[R] = {5, 17, 100, 4134, -100, 2000};
  float logp[R], entropy[R], sums[3 * R], upstream[2 * R];
  for (int i = 0; i < 2 * R; ++i) upstream[i] = normal(i, 1);
  const Logits x{{logits.data(), R, V, V, 1}, run.type, targets};
  const Matrix g{grad.data(), R, V, V, 1}, kept{sums, 3, R, R, 1};
  token_logp({{logp, entropy, kept}, x}, run);
  token_logp_grad({g, x, {kept, upstream, upstream + R, entropy}}, run);
  print(op, "logp", logp, R);
  print(op, "entropy", entropy, R);
  print(op, "sums", sums, 3 * R);
  print(op, "grad", grad.data(), grad.size());
  scale_in_place(g, 0.3f, run);
  print(op, "scaled", grad.data(), grad.size());
}

void dithered_advantages(const char* op, bool gaussian, int level) {
  constexpr int64_t N = 4096, K = 2;
  std::vector<double> rewards(N * K);
  std::vector<int64_t> groups(N), ids(N);
  for (int64_t i = 0; i < N; ++i) groups[i] = i / 8, ids[i] = i * 0x123456789ABCD;
  for (int64_t i = 0; i < N * K; ++i) rewards[i] = i % 5 > 2;
  const double weights[K] = {1.0, 0.3}, half_range[K] = {0.05, 0.2};
  float values[N], mean[N], std[N], dithered_mean[N], dithered_std[N];
  bool dead[N];
  const AdvantageOptions options{gaussian ? Distribution::gaussian : Distribution::uniform,
                                 7,
                                 3,
                                 DeadGroups::apply,
                                 Baseline::mean,
                                 Scale::batch,
                                 Combine::normalize_then_sum,
                                 1e-4,
                                 1};
  group_advantages({{values, mean, std, dead, dithered_mean, dithered_std},
                    {rewards.data(), groups.data(), ids.data(), weights, half_range, N, K},
                    options},
                   0, {1, level});
  print(op, "values", values, N);
  print(op, "dithered_mean", dithered_mean, N);
  print(op, "dithered_std", dithered_std, N);
}

int main() {
  const int level = std::min(best_level(), 1);  // AVX2, or NEON
  const TransformConstants plain{1.0, 1.0f, 1.44269504f, false}, capped{0.7, 0.1f, 11.0f, true};
  token_rows("float32", {Dtype::float32, plain, 1, level});
  token_rows("float32_capped", {Dtype::float32, capped, 1, level});
  token_rows("bfloat16", {Dtype::bfloat16, plain, 1, level});
  token_rows("bfloat16_capped", {Dtype::bfloat16, capped, 1, level});
  token_rows("float16", {Dtype::float16, plain, 1, level});
  token_rows("float16_capped", {Dtype::float16, capped, 1, level});
  dithered_advantages("gaussian", true, level);
  dithered_advantages("uniform", false, level);
}
