// The head's working rows as redit_fast._cpu.HeadRows, and its products; see bindings_cpu.cpp.

#include <pybind11/stl.h>

#include "bindings.h"
#include "linear_loss.h"
#include "product.h"

namespace py = pybind11;

namespace redit {
namespace {

void call_product(const Tensor& c, bool add, const Tensor& a, const Tensor& b, int threads) {
  require(has_product(), "this processor has no bfloat16 products (AVX512_BF16)");
  const int64_t rows = std::get<2>(a), depth = std::get<3>(a), columns = std::get<3>(b);
  require(add || depth >= 1, "a must have at least one column where nothing is added to, got " + describe(a));
  const Matrix left = matrix("a", a, Dtype::bfloat16, rows, depth);
  const Matrix right = matrix("b", b, Dtype::bfloat16, depth, columns);
  const Matrix out = output("c", dense("c", c, Dtype::float32, rows, columns));
  product(static_cast<float*>(out.data), out.row_stride, add, left, right, checked_threads(threads));
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

  void anchor_at_targets(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Setting& setting) {
    const ElementType type = element_type("hidden", hidden);
    const int64_t width = std::get<3>(hidden);
    const Matrix x = matrix("hidden", hidden, dtype(type), count_, width);
    const Matrix w = matrix("weight", weight, dtype(type), vocabulary_, width);
    const Matrix b = given(bias) ? dense("bias", bias, dtype(type), 1, vocabulary_) : Matrix{};
    rows_.anchor_at_targets(x, w, b.data, run(type, setting));
    stage_ = anchored;
  }

  void add(const Tensor& e, const Tensor& tile, int64_t first_row, int64_t first_column, const Setting& setting) {
    require(stage_ != fresh, "add must come after anchor_at_targets");
    const int64_t rows = std::get<2>(tile), columns = std::get<3>(tile);
    const Matrix logits = dense("tile", tile, Dtype::float32, rows, columns);
    require(first_row >= 0 && rows <= count_ && first_row <= count_ - rows,
            "first_row must leave the tile inside the " + std::to_string(count_) + " rows, got " +
                std::to_string(first_row) + " for a tile of " + shape_of(rows, columns));
    require(first_column >= 0 && columns <= vocabulary_ && first_column <= vocabulary_ - columns,
            "first_column must leave the tile inside the " + std::to_string(vocabulary_) + " columns, got " +
                std::to_string(first_column) + " for a tile of " + shape_of(rows, columns));
    const ElementType type = given(e) ? element_type("e", e) : ElementType::float32;
    rows_.add(given(e) ? e_of(e, type) : Matrix{}, logits, first_row, first_column, run(type, setting));
  }

  std::vector<int64_t> repair(int64_t block) {
    require(stage_ == anchored, "repair must come after anchor_at_targets and before finish");
    require(block >= 1, "block must be at least 1, got " + std::to_string(block));
    return rows_.repair(block);
  }

  void finish(const Tensor& logp, const Tensor& entropy, const Tensor& sums, const Setting& setting) {
    require(stage_ == anchored, "finish must come once, after anchor_at_targets");
    const Matrix kept = output("sums", dense("sums", sums, Dtype::float32, 3, count_));
    rows_.finish(vector<float>("logp", logp, count_), vector_or_null<float>("entropy", entropy, count_),
                 static_cast<float*>(kept.data), kept.row_stride, run(ElementType::float32, setting).transform);
    stage_ = finished;
  }

  void resume(const Tensor& sums, const Tensor& entropy, const Tensor& grad_logp, const Tensor& grad_entropy,
              const Setting& setting) {
    require(stage_ == anchored, "resume must come once, after anchor_at_targets");
    require_beside("entropy", entropy, "grad_entropy", given(grad_entropy));
    const Matrix kept = dense("sums", sums, Dtype::float32, 3, count_);
    rows_.resume(static_cast<const float*>(kept.data), kept.row_stride,
                 vector_or_null<const float>("entropy", entropy, count_),
                 vector<const float>("grad_logp", grad_logp, count_),
                 vector_or_null<const float>("grad_entropy", grad_entropy, count_),
                 run(ElementType::float32, setting).transform);
    stage_ = finished;
  }

  void store_targets(const Tensor& e, const Setting& setting) const {
    require(stage_ == finished, "store_targets must come after finish or resume");
    const ElementType type = element_type("e", e);
    rows_.store_targets(e_of(e, type), run(type, setting));
  }

 private:
  Matrix e_of(const Tensor& e, ElementType type) const {
    return output("e", dense("e", e, dtype(type), count_, vocabulary_));
  }

  enum Stage { fresh, anchored, finished };
  int64_t count_, vocabulary_;
  HeadRows rows_;
  Stage stage_ = fresh;
};

}  // namespace

void bind_linear_loss(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def("has_product", &has_product);
  module.def("product", &call_product, Release());
  py::class_<Chunk>(module, "HeadRows")
      .def(py::init<const Tensor&, int64_t>())
      .def("anchor_at_targets", &Chunk::anchor_at_targets, Release())
      .def("add", &Chunk::add, Release())
      .def("repair", &Chunk::repair)
      .def("finish", &Chunk::finish)
      .def("resume", &Chunk::resume)
      .def("store_targets", &Chunk::store_targets);
}

}  // namespace redit
