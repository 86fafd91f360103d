// The head's working rows as redit_fast._cpu.HeadRows, and its products; see bindings_cpu.cpp.
#pragma once

#include "bindings.h"
#include "bindings/token_loss.h"
#include "linear_loss.h"
#include "product.h"

namespace py = pybind11;

namespace redit {
namespace {

void call_product(const Tensor& c, bool add, const Tensor& a, const Tensor& b, bool tiles, py::handle processor) {
  require(own_products() > tiles,
          std::string("this processor has no bfloat16 products by ") + (tiles ? "AMX_BF16" : "AVX512_BF16"));
  const int64_t rows = std::get<2>(a), depth = std::get<3>(a), columns = std::get<3>(b);
  require(add || depth >= 1, "a must have at least one column where nothing is added to, got " + describe(a));
  const Matrix left = matrix("a", a, Dtype::bfloat16, rows, depth);
  const Matrix right = matrix("b", b, Dtype::bfloat16, depth, columns);
  const Matrix out = output("c", dense("c", c, Dtype::float32, rows, columns));
  const int threads = processor_of(processor).threads;
  py::gil_scoped_release release;
  product(static_cast<float*>(out.data), out.row_stride, add, left, right, tiles, threads);
}

// HeadRows, whose calls come in their order and with tensors of one chunk.
class Chunk {
 public:
  Chunk(const Tensor& targets, int64_t vocabulary)
      : count_(std::get<3>(targets)),
        vocabulary_(vocabulary),
        rows_(vector<const int64_t>("targets", targets, count_), count_, vocabulary) {
    require(vocabulary >= 1, "vocabulary must be at least 1, got " + std::to_string(vocabulary));
  }

  void anchor_at_targets(const Tensors<3>& head, py::handle transform, py::handle processor) {
    const auto& [hidden, weight, bias] = head;
    const Dtype type = element_type("hidden", hidden);
    const int64_t width = std::get<3>(hidden);
    const Head args{matrix("hidden", hidden, type, count_, width), matrix("weight", weight, type, vocabulary_, width),
                    given(bias) ? dense("bias", bias, type, 1, vocabulary_) : Matrix{}, type};
    const Run run = run_of(type, transform, processor);
    py::gil_scoped_release release;
    rows_.anchor_at_targets(args, run);
    stage_ = anchored;
  }

  void add(const Tensor& e, const Tensor& tile, std::pair<int64_t, int64_t> first, py::handle transform,
           py::handle processor) {
    const auto [first_row, first_column] = first;
    require(stage_ != fresh, "add must come after anchor_at_targets");
    const int64_t rows = std::get<2>(tile), columns = std::get<3>(tile);
    const Matrix logits = dense("tile", tile, Dtype::float32, rows, columns);
    require(first_row >= 0 && rows <= count_ && first_row <= count_ - rows,
            "first_row must leave the tile inside the " + std::to_string(count_) + " rows, got " +
                std::to_string(first_row) + " for a tile of " + shape_of(rows, columns));
    require(first_column >= 0 && columns <= vocabulary_ && first_column <= vocabulary_ - columns,
            "first_column must leave the tile inside the " + std::to_string(vocabulary_) + " columns, got " +
                std::to_string(first_column) + " for a tile of " + shape_of(rows, columns));
    const Dtype type = given(e) ? element_type("e", e) : Dtype::float32;
    const Matrix out = given(e) ? e_of(e, type) : Matrix{};
    const Run run = run_of(type, transform, processor);
    py::gil_scoped_release release;
    rows_.add(out, logits, first_row, first_column, run);
  }

  std::vector<int64_t> repair(int64_t block) {
    require(stage_ == anchored, "repair must come after anchor_at_targets and before finish");
    require(block >= 1, "block must be at least 1, got " + std::to_string(block));
    return rows_.repair(block);
  }

  void finish(const Tensors<3>& outputs, py::handle transform) {
    require(stage_ == anchored, "finish must come once, after anchor_at_targets");
    rows_.finish(row_results(outputs, count_), filled<TransformConstants>("transform", transform));
    stage_ = finished;
  }

  void resume(const Tensors<4>& upstream, py::handle transform) {
    require(stage_ == anchored, "resume must come once, after anchor_at_targets");
    rows_.resume(row_upstream(upstream, count_), filled<TransformConstants>("transform", transform));
    stage_ = finished;
  }

  void store_targets(const Tensor& e, py::handle transform, py::handle processor) const {
    require(stage_ == finished, "store_targets must come after finish or resume");
    const Dtype type = element_type("e", e);
    rows_.store_targets(e_of(e, type), run_of(type, transform, processor));
  }

 private:
  Matrix e_of(const Tensor& e, Dtype type) const { return output("e", dense("e", e, type, count_, vocabulary_)); }

  enum Stage { fresh, anchored, finished };
  int64_t count_, vocabulary_;
  HeadRows rows_;
  Stage stage_ = fresh;
};

}  // namespace

inline void bind_linear_loss(py::module_& module) {
  module.def("own_products", &own_products);
  module.def("product", &call_product);
  py::class_<Chunk>(module, "HeadRows")
      .def(py::init<const Tensor&, int64_t>())
      .def("anchor_at_targets", &Chunk::anchor_at_targets)
      .def("add", &Chunk::add)
      .def("repair", &Chunk::repair)
      .def("finish", &Chunk::finish)
      .def("resume", &Chunk::resume)
      .def("store_targets", &Chunk::store_targets);
}

}  // namespace redit
