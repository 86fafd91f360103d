// The launches of the head; linear_loss.cu and linear_loss_product.cu say which there are.

#include <algorithm>
#include <limits>

#include "cuda/linear_loss.h"

namespace redit {

using cuda::Device, cuda::Launch, cuda::launch_of, cuda::Launches;

namespace {

Launch over_rows(const char* kernel, const HeadLaunch& args) {
  return launch_of(kernel, args.head.hidden.rows, kRowThreads, 1, 0, args);
}

Launches over_tiles(const char* kernel, const HeadLaunch& args) {
  Launches result;
  HeadLaunch a = args;
  for (a.first_column = 0; a.first_column < a.head.weight.rows; a.first_column += a.logits.columns)
    result.push_back(launch_of(kernel, a.head.hidden.rows, int(a.logits.columns) / kPerThread, 1, 0, a));
  return result;
}

// What a tensor map takes.
bool has_map(const Matrix& x) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kProductPeers * kProductRows;
  return x.column_stride == 1 && x.row_stride >= x.columns && x.row_stride % 8 == 0 && x.columns > 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.rows <= kMost && x.row_stride <= kMost;
}

Launch product(const char* kernel, const HeadLaunch& args, const Device& device, int64_t clusters) {
  const ProductLaunch a{cuda::tensor_map(args.head.hidden, kProductRows, device),
                        cuda::tensor_map(args.head.weight, kProductRows, device), args};
  return launch_of(kernel, clusters * kProductPeers, kProductThreads, kProductPeers, kProductShared, a);
}

// Persistent: as many clusters as the device holds at once, or as there are tiles.
Launch product(const char* kernel, const HeadLaunch& args, const Device& device) {
  const int64_t pairs = (args.head.hidden.rows - 1) / (kProductPeers * kProductRows) + 1;
  const Launch one = product(kernel, args, device, 1);
  return product(kernel, args, device,
                 std::min<int64_t>(pairs * args.part_count, cuda::resident_clusters(device, one)));
}

}  // namespace

bool has_product(const HeadLaunch& args, const Device& device) {
  const bool bfloat16 = args.head.type == Dtype::bfloat16 && (!args.e.data || args.e_type == Dtype::bfloat16);
  const bool dense = !args.e.data || args.e.column_stride == 1;
  if (device.architecture != 90 || !bfloat16 || !dense || !has_map(args.head.hidden) || !has_map(args.head.weight))
    return false;
  return cuda::resident_clusters(device, product("linear_loss_product", args, device, 1)) > 0;
}

HeadPlan plan_exp_product(const HeadLaunch& args, const Device& device) {
  const Launch first = over_rows("linear_loss_anchor", args), last = over_rows("linear_loss_finish", args);
  if (args.logits.data) return {{first}, over_tiles("linear_loss_tile", args), {last}};
  return {{first, product("linear_loss_product", args, device), last}, {}, {}};
}

HeadPlan plan_exp_product_grad(const HeadLaunch& args, const Device& device) {
  const Launch first = over_rows("linear_loss_resume", args);
  if (args.logits.data) return {{first}, over_tiles("linear_loss_tile_grad", args), {}};
  return {{first, product("linear_loss_product_grad", args, device)}, {}, {}};
}

}  // namespace redit
