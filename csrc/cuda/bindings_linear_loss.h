// The head's launches; see bindings_cuda.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/token_loss.h"
#include "cuda/linear_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

using Plan = std::tuple<cuda::Launches, cuda::Launches, cuda::Launches>;  // before the tiles, one a tile, after them

HeadLaunch head_of(const Tensor& e, const Tensors<4>& inputs, py::handle transform) {
  const auto& [hidden, weight, bias, targets] = inputs;
  const Dtype type = element_type("hidden", hidden);
  const int64_t R = std::get<2>(hidden), D = std::get<3>(hidden), V = std::get<2>(weight);
  require(R >= 1, "hidden must have at least one row, got " + describe(hidden));
  require(V >= 1, "weight must have at least one row, got " + describe(weight));
  HeadLaunch a{};
  a.head = {matrix("hidden", hidden, type, R, D), matrix("weight", weight, type, V, D),
            given(bias) ? dense("bias", bias, type, 1, V) : Matrix{}, type};
  a.targets = vector<const int64_t>("targets", targets, R);
  a.transform = filled<TransformConstants>("transform", transform);
  a.part_count = (V + kPart - 1) / kPart;
  if (given(e)) {
    a.e_type = element_type("e", e);
    a.e = output("e", matrix("e", e, a.e_type, R, V));
  }
  return a;
}

// Rows (R, 6), their parts (R, 4 a part), and of a tile the logits (R, columns) float32. Where the product is our own
// there are none, but a tile's copy (columns, D) of a weight that has no map.
void take_scratch(HeadLaunch& a, const Tensors<3>& scratch, const cuda::Device& device) {
  const auto& [rows, parts, tile] = scratch;
  const int64_t R = a.head.hidden.rows, D = a.head.hidden.columns;
  static_assert(sizeof(HeadRow) == 6 * sizeof(float) && sizeof(HeadPart) == 4 * sizeof(float));
  a.rows = reinterpret_cast<HeadRow*>(vector<float>("rows", rows, 6 * R));
  if (given(parts)) a.parts = reinterpret_cast<HeadPart*>(vector<float>("parts", parts, 4 * R * a.part_count));
  require(reinterpret_cast<Address>(a.parts) % 16 == 0, "parts must begin at a multiple of 16 bytes");
  const bool own = has_product(a, device);
  if (own) require(has_map(a.head.hidden), "hidden must be rows of 16 bytes at multiples of 16");
  if (own && !given(tile)) {
    require(has_map(a.head.weight), "tile must be given for a weight that is not rows of 16 bytes at multiples of 16");
    return;
  }
  const int64_t columns = own ? std::get<2>(tile) : std::get<3>(tile);
  require(columns >= kPart && columns <= kMostTile && columns % kPart == 0,
          "tile must be of a multiple of 256 columns up to 4096, got " + describe(tile));
  Matrix& room = own ? a.copy : a.logits;
  room = output(
      "tile", own ? dense("tile", tile, Dtype::bfloat16, columns, D) : dense("tile", tile, Dtype::float32, R, columns));
  require(room.row_stride % (own ? 8 : 4) == 0 && reinterpret_cast<Address>(room.data) % 16 == 0,
          "tile must be rows that begin at multiples of 16 bytes, got " + describe(tile));
}

Plan tuple_of(HeadPlan plan) { return {std::move(plan.before), std::move(plan.tiles), std::move(plan.after)}; }

bool call_has_product(const Tensor& e, const Tensors<4>& inputs, py::handle transform, py::handle device) {
  return has_product(head_of(e, inputs, transform), filled<cuda::Device>("device", device));
}

Plan call_exp_product(const Tensor& e, const Tensors<3>& outputs, const Tensors<4>& inputs, py::handle transform,
                      const Tensors<3>& scratch, py::handle device) {
  HeadLaunch a = head_of(e, inputs, transform);
  const auto its = filled<cuda::Device>("device", device);
  take_scratch(a, scratch, its);
  require(a.parts, "parts must be given, got None");
  a.out = row_results(outputs, a.head.hidden.rows);
  return tuple_of(plan_exp_product(a, its));
}

Plan call_exp_product_grad(const Tensor& e, const Tensors<4>& inputs, const Tensors<4>& upstream, py::handle transform,
                           const Tensors<3>& scratch, py::handle device) {
  HeadLaunch a = head_of(e, inputs, transform);
  const auto its = filled<cuda::Device>("device", device);
  require(a.e.data, "e must be given, got None");
  take_scratch(a, scratch, its);
  a.upstream = row_upstream(upstream, a.head.hidden.rows);
  return tuple_of(plan_exp_product_grad(a, its));
}

}  // namespace

inline void bind_linear_loss(py::module_& module) {
  module.def("has_product", &call_has_product);
  module.def("exp_product", &call_exp_product);
  module.def("exp_product_grad", &call_exp_product_grad);
}

}  // namespace redit
