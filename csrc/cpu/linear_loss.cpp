// The head; redit_fast/backends/reference/linear_loss.py is the definition, redit_fast/backends/cpu/ has the
// products.
//
// Memory: a tile of logits (1 MB a thread) is written by the product and read once, from the cache; of E every element
// is written once. At a width of 1024 the product takes 100 times the time of the exponentials.

#include "linear_loss.h"

#include <cmath>
#include <limits>

namespace redit {

HeadRows::HeadRows(const int64_t* targets, int64_t rows, int64_t vocabulary)
    : rows_(size_t(rows)), vocabulary_(vocabulary) {
  for (int64_t r = 0; r < rows; ++r) rows_[size_t(r)].target = targets[r];
}

void HeadRows::anchor_at_targets(const Head& head, const Run& run) {
  const RowKernels& kernel = row_kernels(run);
  const Matrix &hidden = head.hidden, &weight = head.weight;
  const int64_t width = hidden.columns;
  for_each_row(hidden.rows, width, 2 * width, run, [&](int64_t r, void* scratch) {
    State& row = rows_[size_t(r)];
    row.at_target = kNaN;
    if (!stray(row.target, vocabulary_)) {
      void* second = static_cast<uint32_t*>(scratch) + width;
      row.at_target =
          kernel.dot(contiguous_row(hidden, r, run, scratch), contiguous_row(weight, row.target, run, second), width);
      if (head.bias.data) row.at_target += kernel.read(head.bias.data, row.target);
    }
    row.anchor = row.at_target;
    row.largest = -std::numeric_limits<float>::infinity();
    row.others = row.weighted = 0;
    row.slopes = {float(run.transform.slope), 0};
  });
}

void HeadRows::add(const Matrix& e, const Matrix& tile, int64_t first_row, int64_t first_column, const Run& run) {
  const RowKernels& kernel = row_kernels(run);
  for_each_row(tile.rows, tile.columns, 0, run, [&](int64_t r, void*) {
    State& row = rows_[size_t(first_row + r)];
    void* out = e.data ? row_of(e, first_row + r, run) + first_column * size_of(run.type) : nullptr;
    const float* logits = static_cast<const float*>(tile.data) + r * tile.row_stride;
    const int64_t target = row.target - first_column;
    const TileSums found = kernel.exponentials(out, logits, tile.columns, stray(target, tile.columns) ? -1 : target,
                                               row.anchor, row.slopes, run.transform);
    row.others += found.sums.others;
    row.weighted += found.sums.weighted;
    row.largest = std::max(row.largest, found.largest);
  });
}

std::vector<int64_t> HeadRows::repair(int64_t block) {
  std::vector<int64_t> blocks;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (!needs_repair(rows_[r].anchor, float(rows_[r].others))) continue;
    rows_[r].anchor = rows_[r].largest;
    const int64_t first = int64_t(r) / block * block;
    if (blocks.empty() || blocks.back() != first) blocks.push_back(first);
  }
  for (int64_t first : blocks)
    for (size_t r = size_t(first); r < std::min(rows_.size(), size_t(first + block)); ++r)
      rows_[r].others = rows_[r].weighted = 0;
  return blocks;
}

void HeadRows::finish(const RowResults& out, const TransformConstants& transform) {
  for (size_t r = 0; r < rows_.size(); ++r) {
    State& state = rows_[r];
    const RowSums found{float(state.others), float(state.weighted)};
    const Row row = redit::finish(state.anchor, state.at_target, found, transform);
    store_row(out, int64_t(r), row);
    aim(state, row, 1, 0, transform);
  }
}

void HeadRows::resume(const RowUpstream& in, const TransformConstants& transform) {
  for (size_t r = 0; r < rows_.size(); ++r) {
    State& state = rows_[r];
    Row row = kept_row(in, int64_t(r));
    row.target = state.at_target;
    state.anchor = row.anchor;
    aim(state, row, in.grad_logp[r], in.grad_entropy ? in.grad_entropy[r] : 0, transform);
  }
}

void HeadRows::aim(State& state, const Row& row, float g, float h, const TransformConstants& transform) {
  state.slopes = slopes_of(row, g, h, -1, transform);
  state.e_at_target = gradient_at_target(row, g, h, -1, transform);
}

void HeadRows::store_targets(const Matrix& e, const Run& run) const {
  const RowKernels& kernel = row_kernels(run);
  for (size_t r = 0; r < rows_.size(); ++r)
    if (!stray(rows_[r].target, vocabulary_))
      kernel.write(row_of(e, int64_t(r), run), rows_[r].target, rows_[r].e_at_target);
}

}  // namespace redit
