// Passes over parameters; redit_fast/backends/reference/params.py is the definition.
//
// One parallel loop a pass over chunks of 64 K elements of all tensors. Sums are of blocks in a fixed number of lanes,
// added in their order: their bits depend on neither threads nor instruction set.
// Memory per weight, float32 / bfloat16 with master: norm reads 4 / 2 bytes, perturb moves 12 / 6 and 4 / 2 more where
// it scales the gradients, combine 12 / 6, AdamW 28 / 28.

#include "params.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "formats.h"
#include "shared/element.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#undef REDIT_INLINE  // simd.h has its own, of internal linkage

namespace redit {
namespace {

constexpr int64_t kChunk = 65536;  // elements: 256 KB of float32, and a fork-join (5-10 us) is small beside it
constexpr int64_t kBlock = 1024;   // elements converted at a time: buffers of 4 KB stay in the first-level cache
constexpr int kLanes = 16;
constexpr uint32_t kStreamRounding = 0x10000;

template <class W>
constexpr Dtype kDtype = sizeof(W) == 8 ? Dtype::float64 : Dtype::float32;

struct ChunkKernels {  // elements [begin, end) of one tensor
  double (*sum_of_squares)(const void* tensor, int64_t begin, int64_t end);
  void (*perturb)(double* sums, const Perturbation& args, int64_t tensor, int64_t begin, int64_t end);
  void (*combine)(double* sums, const Array& first, const Array& grad, int64_t begin, int64_t end, double ratio);
  void (*adamw)(const AdamwStep& args, int64_t tensor, int64_t begin, int64_t end);
};

#define REDIT_KERNELS "param_chunks.h"
#include "levels.h"

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> chunks_of(const Sizes& numels) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < numels.size(); ++t)
    for (int64_t begin = 0; begin < numels[t]; begin += kChunk)
      chunks.push_back({int64_t(t), begin, std::min(begin + kChunk, numels[t])});
  return chunks;
}

template <class Body>
void for_each_chunk(const std::vector<Chunk>& chunks, int threads, const Body& body) {
  const int64_t count = int64_t(chunks.size());
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) body(i, chunks[i]);
}

// `body(sums, chunk)` fills each chunk's own, which are added up in their order.
template <size_t count, class Body>
void sum_over_chunks(double* sums, const Sizes& numels, int threads, const Body& body) {
  const auto chunks = chunks_of(numels);
  std::vector<std::array<double, count>> partials(chunks.size());
  for_each_chunk(chunks, threads, [&](int64_t i, const Chunk& chunk) { body(partials[i].data(), chunk); });
  std::fill(sums, sums + count, 0.0);
  for (const auto& partial : partials)
    for (size_t k = 0; k < count; ++k) sums[k] += partial[k];
}

}  // namespace

void squared_norm(const SquaredNorm& args, int threads, int level) {
  sum_over_chunks<1>(args.out, args.numels, threads, [&](double* out, const Chunk& chunk) {
    const Array& tensor = args.tensors[chunk.tensor];
    *out = kernels(level)[int(tensor.dtype)].sum_of_squares(tensor.data, chunk.begin, chunk.end);
  });
}

void perturb(const Perturbation& args, int threads, int level) {
  std::fill(args.sums, args.sums + 4, 0.0);
  if (*args.scale == 0) return;  // also where a gradient is NaN
  sum_over_chunks<4>(args.sums, args.numels, threads, [&](double* out, const Chunk& chunk) {
    const Dtype type = args.params[chunk.tensor].dtype;
    kernels(level)[int(type)].perturb(out, args, chunk.tensor, chunk.begin, chunk.end);
  });
}

void combine(const Combination& args, int threads, int level) {
  sum_over_chunks<3>(args.sums, args.numels, threads, [&](double* out, const Chunk& chunk) {
    const Array &first = args.firsts[chunk.tensor], &grad = args.grads[chunk.tensor];
    kernels(level)[int(grad.dtype)].combine(out, first, grad, chunk.begin, chunk.end, args.ratio);
  });
}

void adamw(const AdamwStep& args, int threads, int level) {
  for_each_chunk(chunks_of(args.numels), threads, [&](int64_t, const Chunk& chunk) {
    kernels(level)[int(args.params[chunk.tensor].dtype)].adamw(args, chunk.tensor, chunk.begin, chunk.end);
  });
  if (*args.finite)
    for (float* step : args.steps) *step += 1;
}

}  // namespace redit
