// What the plan of the passes over parameters hands to their kernels: tables of tensors, which travel in the launch, so
// that nothing is uploaded. A list that a table has no room for is several launches.
#pragma once

#include "cuda/launch.h"
#include "shared/element.h"

namespace redit {

// What a block takes at a time, of one tensor, and what a partial sum is of, whatever the grid. A block of 256 threads
// moves the 0.2 to 0.9 MB in 25 to 110 us, so few are idle at the end; partial sums are 1/6000 of the bytes moved.
constexpr int64_t kWeights = 32768;
constexpr int kParamsThreads = 256, kParamsBlocks = 4;  // of a block; of a multiprocessor
constexpr int kSumThreads = 1024;

inline int64_t chunks_of(int64_t numel) { return (numel + kWeights - 1) / kWeights; }

struct NormTensor {
  const void* x;
  int64_t numel;
  int first_chunk;  // of the launch's chunks
};

struct PerturbTensor {
  void *param, *grad;
  int64_t numel, offset;
  int first_chunk;
};

struct CombineTensor {
  const void* first;
  void* grad;
  int64_t numel;
  int first_chunk;
};

struct AdamwTensor {
  void *param, *master;  // master null: the weights are param's
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  const AdamwScalars<float>* scalars;
  int64_t numel;
  int first_chunk;
};

struct Nothing {};

struct PerturbNumbers {
  const double* scale;
  const int64_t* step;
  PhiloxKeys keys;  // made here, they cost the kernels nothing: an operand in constant memory
  bool stochastic, scales;
  float factor;  // of the gradients, where the pass `scales` them
  Dtype seen;    // the forward pass's type of 16 bits, or float32: it sees what is there
};

template <class Entry, class Its>
struct ParamsLaunch {
  using Listed = Entry;
  static constexpr int kMost = int((4096 - 32 - sizeof(Its)) / sizeof(Entry));

  double* partials;   // of this launch's first chunk; sum k lies k `stride` further
  int64_t stride;     // all chunks of the pass
  int chunks, count;  // of this launch; count: tensors
  Its numbers;
  Entry tensors[kMost];
};

using NormLaunch = ParamsLaunch<NormTensor, Nothing>;
using PerturbLaunch = ParamsLaunch<PerturbTensor, PerturbNumbers>;
using CombineLaunch = ParamsLaunch<CombineTensor, double>;   // the ratio
using AdamwLaunch = ParamsLaunch<AdamwTensor, const bool*>;  // whether the step is finite

struct SumLaunch {
  double* out;
  const double* partials;
  int64_t stride;
};

// Before the weights: the numbers of each tensor's step, and the count of its steps.
struct ScalarsLaunch {
  static constexpr int kMost = 500;

  const double* factor;
  const bool* finite;
  AdamwOptions options;
  AdamwScalars<float>* scalars;  // of the first tensor
  int count;
  float* steps[kMost];
};

// `partials` has room for every sum of every chunk, `scalars` for every tensor.
cuda::Launches plan_squared_norm(const SquaredNorm& args, double* partials, const cuda::Device& device);
cuda::Launches plan_perturb(const Perturbation& args, double* partials, const cuda::Device& device);
cuda::Launches plan_combine(const Combination& args, double* partials, const cuda::Device& device);
cuda::Launches plan_adamw(const AdamwStep& args, AdamwScalars<float>* scalars, const cuda::Device& device);

}  // namespace redit
