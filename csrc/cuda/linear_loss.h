// What the plan of the head hands to its kernels.
#pragma once

#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "shared/args.h"

namespace redit {

constexpr int kPart = 256;       // columns whose exponentials are one partial sum
constexpr int kPerThread = 8;    // columns of a tile that a thread has
constexpr int kMostTile = 4096;  // columns of a tile
constexpr int kHeadThreads = 256;

// A row between its kernels. E is e_j (constant + by_gap y_j) dz/dx_j with the exponentials taken from `anchor`.
struct HeadRow {
  float at_target;  // the target's logit; NaN for a target outside the vocabulary
  float anchor, constant, by_gap;
  float e_at_target, total;
};

struct alignas(16) HeadPart {  // of kPart columns of a row, without the target's
  float others, weighted, largest;
  float anchor;  // what these exponentials were taken from: the target's logit, or the largest of these
};

struct HeadLaunch {
  Matrix e;  // absent: the sums alone
  Dtype e_type;
  Head head;
  const int64_t* targets;
  TransformConstants transform;
  RowResults out;        // of exp_product
  RowUpstream upstream;  // of exp_product_grad
  HeadRow* rows;         // (R,)
  HeadPart* parts;       // (R, part_count), of exp_product
  int64_t part_count;
  Matrix logits;  // (R, columns of a tile) float32, of the tile that begins at first_column
  Matrix copy;    // (columns of a tile, D), the tile's rows of a weight that no tensor map takes as it lies
  int64_t first_column;
};

// The product with the exponentials at its end, linear_loss_product.cu: its tile, and the ring that brings it.
constexpr int kProductRows = 128, kProductPeers = 2, kProductThreads = 384, kProductStages = 4;
constexpr int kProductShared =
    1024 + kProductStages * (kProductRows + kPart) * 2 * cuda::kBoxColumns + kProductStages * 16;

struct ProductLaunch {
  device::TensorMap hidden, weight;  // boxes of kProductRows rows
  HeadLaunch head;
  int first_part, parts;  // of the vocabulary: those that the weight's map begins with, and has
};

struct HeadPlan {
  cuda::Launches before, tiles, after;  // before each of the tiles comes its product, or the copy of its weight
};

// Whether the exponentials come at the end of a product of our own, without logits. How the inputs lie does not matter:
// another product has other bits. hidden must then have a map, and the weight, or its copy.
bool has_map(const Matrix& x);
bool has_product(const HeadLaunch& args, const cuda::Device& device);

HeadPlan plan_exp_product(const HeadLaunch& args, const cuda::Device& device);
HeadPlan plan_exp_product_grad(const HeadLaunch& args, const cuda::Device& device);

}  // namespace redit
