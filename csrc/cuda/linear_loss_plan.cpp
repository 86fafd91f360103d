// The launches of the head; linear_loss.cu and linear_loss_product.cu say which there are.

#include <algorithm>
#include <limits>

#include "cuda/linear_loss.h"

namespace redit {

using cuda::Device, cuda::Launch, cuda::launch_of, cuda::Launches;

namespace {

Launch over_rows(const char* kernel, const HeadLaunch& args) {
  return launch_of(kernel, args.head.hidden.rows, kHeadThreads, 1, 0, args);
}

Launches over_tiles(const char* kernel, const HeadLaunch& args) {
  Launches result;
  HeadLaunch a = args;
  for (a.first_column = 0; a.first_column < a.head.weight.rows; a.first_column += a.logits.columns)
    result.push_back(launch_of(kernel, a.head.hidden.rows, int(a.logits.columns) / kPerThread, 1, 0, a));
  return result;
}

int64_t pairs_of(const HeadLaunch& args) { return (args.head.hidden.rows - 1) / (kProductPeers * kProductRows) + 1; }

// Of the columns that begin at first_column and whose rows of the weight are `weight`. Persistent: as many clusters as
// the device holds at once, or as there are tiles.
Launch product(const char* kernel, const HeadLaunch& args, const Matrix& weight, const Device& device) {
  const int parts = int((weight.rows - 1) / kPart) + 1;
  const ProductLaunch a{cuda::tensor_map(args.head.hidden, kProductRows, device),
                        cuda::tensor_map(weight, kProductRows, device), args, int(args.first_column / kPart), parts};
  Launch launch = launch_of(kernel, kProductPeers, kProductThreads, kProductPeers, kProductShared, a);
  launch.blocks *= std::min<int64_t>(pairs_of(args) * parts, cuda::resident_clusters(device, launch));
  return launch;
}

Launches over_copies(const char* kernel, const HeadLaunch& args, const Device& device) {
  Launches result;
  HeadLaunch a = args;
  for (a.first_column = 0; a.first_column < a.head.weight.rows; a.first_column += a.copy.rows) {
    Matrix copy = a.copy;
    copy.rows = std::min(copy.rows, a.head.weight.rows - a.first_column);
    result.push_back(product(kernel, a, copy, device));
  }
  return result;
}

}  // namespace

bool has_map(const Matrix& x) {
  return x.column_stride == 1 && x.row_stride >= x.columns && x.row_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

bool has_product(const HeadLaunch& args, const Device& device) {
  const auto& [hidden, weight, bias, type] = args.head;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  const bool dense = !args.e.data || (args.e_type == Dtype::bfloat16 && args.e.column_stride == 1);
  if (device.architecture != 90 || type != Dtype::bfloat16 || !dense || hidden.columns % 8 != 0 ||
      hidden.columns == 0 ||
      std::max({hidden.rows, weight.rows, hidden.columns, pairs_of(args) * args.part_count}) > kMost)
    return false;
  const ProductLaunch none{};
  return cuda::resident_clusters(device, launch_of("linear_loss_product", kProductPeers, kProductThreads, kProductPeers,
                                                   kProductShared, none)) > 0;
}

HeadPlan plan_exp_product(const HeadLaunch& args, const Device& device) {
  const Launch first = over_rows("linear_loss_anchor", args), last = over_rows("linear_loss_finish", args);
  if (args.logits.data) return {{first}, over_tiles("linear_loss_tile", args), {last}};
  if (args.copy.data) return {{first}, over_copies("linear_loss_product", args, device), {last}};
  return {{first, product("linear_loss_product", args, args.head.weight, device), last}, {}, {}};
}

HeadPlan plan_exp_product_grad(const HeadLaunch& args, const Device& device) {
  const Launch first = over_rows("linear_loss_resume", args);
  if (args.logits.data) return {{first}, over_tiles("linear_loss_tile_grad", args), {}};
  if (args.copy.data) return {{first}, over_copies("linear_loss_product_grad", args, device), {}};
  return {{first, product("linear_loss_product_grad", args, args.head.weight, device)}, {}, {}};
}

}  // namespace redit
