// The head's launches; see bindings_cuda.cpp.

#include <pybind11/pybind11.h>

#include "bindings/token_loss.h"
#include "cuda/linear_loss.h"

namespace py = pybind11;

namespace redit {
namespace {

using Plan = std::tuple<cuda::Launches, cuda::Launches, cuda::Launches>;  // before the tiles, one a tile, after them

// Scratch: the rows (R, 6) and their parts (R, 4 a part), and a tile of the logits.
HeadLaunch head_of(const Tensor& e, const Tensors<4>& inputs, py::handle transform, const Tensors<3>& scratch) {
  const auto& [hidden, weight, bias, targets] = inputs;
  const auto& [rows, parts, logits] = scratch;
  const Dtype type = element_type("hidden", hidden);
  const int64_t R = std::get<2>(hidden), D = std::get<3>(hidden), V = std::get<2>(weight);
  require(V >= 1, "weight must have at least one row, got " + describe(weight));
  HeadLaunch a{};
  a.head = {matrix("hidden", hidden, type, R, D), matrix("weight", weight, type, V, D),
            given(bias) ? matrix("bias", bias, type, 1, V) : Matrix{}, type};
  a.targets = vector<const int64_t>("targets", targets, R);
  a.transform = filled<TransformConstants>("transform", transform);
  if (given(e)) {
    a.e_type = element_type("e", e);
    a.e = output("e", matrix("e", e, a.e_type, R, V));
  }
  static_assert(sizeof(HeadRow) == 6 * sizeof(float) && sizeof(HeadPart) == 4 * sizeof(float));
  a.rows = reinterpret_cast<HeadRow*>(vector<float>("rows", rows, 6 * R));
  if (given(parts)) {
    a.part_count = (V + kPart - 1) / kPart;
    a.parts = reinterpret_cast<HeadPart*>(vector<float>("parts", parts, 4 * R * a.part_count));
  }
  const int64_t columns = std::get<3>(logits);
  a.logits = output("logits", dense("logits", logits, Dtype::float32, R, columns));
  require(columns >= kPart && columns <= kMostTile && columns % kPart == 0,
          "logits must have a multiple of 256 columns up to 4096, got " + describe(logits));
  require(a.logits.row_stride % 4 == 0 && reinterpret_cast<Address>(a.logits.data) % 16 == 0,
          "the rows of logits must begin at multiples of 16 bytes, got " + describe(logits));
  return a;
}

Plan tuple_of(HeadPlan plan) { return {std::move(plan.before), std::move(plan.tiles), std::move(plan.after)}; }

Plan call_exp_product(const Tensor& e, const Tensors<3>& outputs, const Tensors<4>& inputs, py::handle transform,
                      const Tensors<3>& scratch) {
  HeadLaunch a = head_of(e, inputs, transform, scratch);
  require(a.parts, "parts must be given, got None");
  a.out = row_results(outputs, a.head.hidden.rows);
  return tuple_of(plan_exp_product(a));
}

Plan call_exp_product_grad(const Tensor& e, const Tensors<4>& inputs, const Tensors<4>& upstream, py::handle transform,
                           const Tensors<3>& scratch) {
  HeadLaunch a = head_of(e, inputs, transform, scratch);
  require(a.e.data, "e must be given, got None");
  a.upstream = row_upstream(upstream, a.head.hidden.rows);
  return tuple_of(plan_exp_product_grad(a));
}

}  // namespace

void bind_linear_loss(py::module_& module) {
  module.def("exp_product", &call_exp_product);
  module.def("exp_product_grad", &call_exp_product_grad);
}

}  // namespace redit
