// The launches of the head; linear_loss.cu says which there are.

#include "cuda/linear_loss.h"

namespace redit {

using cuda::launch_of, cuda::Launches;

namespace {

Launches tiles(const char* kernel, const HeadLaunch& args) {
  Launches result;
  HeadLaunch a = args;
  for (a.first_column = 0; a.first_column < a.head.weight.rows; a.first_column += a.logits.columns)
    result.push_back(launch_of(kernel, a.head.hidden.rows, int(a.logits.columns) / kPerThread, 1, 0, a));
  return result;
}

Launches over_rows(const char* kernel, const HeadLaunch& args) {
  return {launch_of(kernel, args.head.hidden.rows, kRowThreads, 1, 0, args)};
}

}  // namespace

HeadPlan plan_exp_product(const HeadLaunch& args) {
  return {over_rows("linear_loss_anchor", args), tiles("linear_loss_tile", args),
          over_rows("linear_loss_finish", args)};
}

HeadPlan plan_exp_product_grad(const HeadLaunch& args) {
  return {over_rows("linear_loss_resume", args), tiles("linear_loss_tile_grad", args), {}};
}

}  // namespace redit
