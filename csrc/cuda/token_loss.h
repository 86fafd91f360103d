// What the plan of the token losses hands to their kernels.
#pragma once

#include "cuda/launch.h"
#include "shared/args.h"

namespace redit {

// A row's sums: vectors of 16 bytes, counted from the row's first element, in `count` slices of `vectors` each. A slice
// is a block's: its thread t adds vectors t, t + threads, ... A function of the vocabulary and the type alone, and the
// same for every kernel, so that the bits of a row depend on nothing else.
struct Slices {
  int count, vectors, threads;
};

constexpr int kRowThreads = 512, kFewThreads = 128;
constexpr int kFewGranules = 1280;    // up to which a row has kFewThreads
constexpr int kSliceGranules = 4834;  // of 16 bytes: three buffers of them are a block's shared memory
constexpr int kMostSlices = 384;      // 128 bytes of partial sums each
constexpr int kMostPeers = 8;         // blocks of a cluster
constexpr int kStages = 3;            // buffers of a block
constexpr int kClusterHeader = 368;   // bytes before them
constexpr int kSpanThreads = 256;     // of a block that has a span of a row
constexpr int kSpanVectors = 2048;    // 32 KB
constexpr int64_t kMostColumns = 2'000'000'000;
constexpr int kTotalThreads = 1024;

struct TokenLossLaunch {
  TokenLoss op;
  TransformConstants transform;
  Slices slices;
  float* row_losses;  // (R,): room
};

struct TokenLogpLaunch {
  TokenLogp op;
  TransformConstants transform;
  Slices slices;
};

struct TokenLogpGradLaunch {
  TokenLogpGrad op;
  TransformConstants transform;
  int spans;  // of a row
};

struct ScaleLaunch {
  Matrix x;
  const float* factor;
  int spans;
};

cuda::Launches plan_token_loss(const TokenLoss& op, const TransformConstants& transform, float* row_losses,
                               const cuda::Device& device);
cuda::Launches plan_token_logp(const TokenLogp& op, const TransformConstants& transform, const cuda::Device& device);
cuda::Launches plan_token_logp_grad(const TokenLogpGrad& op, const TransformConstants& transform,
                                    const cuda::Device& device);
cuda::Launches plan_scale_in_place(const Matrix& x, Dtype type, const float* factor, const cuda::Device& device);

}  // namespace redit
