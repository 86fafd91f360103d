// The head: what lies around the product of hidden rows with the weight, tile of the vocabulary by tile.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace redit {

// A chunk of rows between its first product tile and its results. Calls in this order: anchor_at_targets; add for every
// tile; repair, and add again for every tile of the blocks that it names; finish; store_targets. In the backward pass
// anchor_at_targets; resume; add for every tile, with e; store_targets.
class HeadRows {
 public:
  HeadRows(const int64_t* targets, int64_t rows, int64_t vocabulary);

  // The float32 logit hidden . weight[target] + bias[target] of every row; NaN for a target outside the vocabulary.
  void anchor_at_targets(const Head& head, const Run& run);

  // Logits `tile` of rows from first_row on and columns from first_column on: adds to their sums, and writes
  // e_j dz/dx_j, or after resume the gradient, into those rows and columns of e, of run's type, where e.data is not
  // null.
  void add(const Matrix& e, const Matrix& tile, int64_t first_row, int64_t first_column, const Run& run);

  // Rows whose sum exceeds e^40 or is not finite get their largest logit as anchor; their blocks' first rows, whose
  // sums start again.
  std::vector<int64_t> repair(int64_t block);

  void finish(const RowResults& out, const TransformConstants& transform);

  // Anchors and slopes from what finish wrote and the upstream gradients.
  void resume(const RowUpstream& in, const TransformConstants& transform);

  void store_targets(const Matrix& e, const Run& run) const;

 private:
  struct State {
    int64_t target;
    float at_target, anchor, largest;
    double others, weighted;
    Slopes slopes;
    float e_at_target;
  };

  // E is the gradient times -s, the sum that beta divides by.
  static void aim(State& state, const Row& row, float g, float h, const TransformConstants& transform);

  std::vector<State> rows_;
  int64_t vocabulary_;
};

}  // namespace redit
