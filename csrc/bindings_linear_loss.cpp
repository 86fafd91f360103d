// The head's working rows as redit_fast._cpu.HeadRows, and its products; see bindings_cpu.cpp.

#include <pybind11/stl.h>

#include "bindings.h"
#include "linear_loss.h"
#include "product.h"

namespace py = pybind11;

namespace redit {

void bind_linear_loss(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def("has_product", &has_product);
  module.def(
      "product",
      [](Address c, int64_t c_stride, bool add, const Strided& a, const Strided& b, int threads) {
        if (!has_product()) throw std::invalid_argument("this processor has no bfloat16 products (AVX512_BF16)");
        product(pointer<float>(c), c_stride, add, matrix(a), matrix(b), threads);
      },
      Release());
  py::class_<HeadRows>(module, "HeadRows")
      .def(py::init([](Address targets, int64_t rows, int64_t vocabulary) {
        return HeadRows(pointer<const int64_t>(targets), rows, vocabulary);
      }))
      .def(
          "anchor_at_targets",
          [](HeadRows& rows, const Strided& hidden, const Strided& weight, Address bias, const Setting& setting) {
            rows.anchor_at_targets(matrix(hidden), matrix(weight), pointer<const void>(bias), run(setting));
          },
          Release())
      .def(
          "add",
          [](HeadRows& rows, const Strided& e, const Strided& tile, int64_t first_row, int64_t first_column,
             const Setting& setting) { rows.add(matrix(e), matrix(tile), first_row, first_column, run(setting)); },
          Release())
      .def("repair", &HeadRows::repair)
      .def("finish",
           [](HeadRows& rows, Address logp, Address entropy, Address sums, int64_t sums_stride, Address grad_logp,
              Address grad_entropy, const Setting& setting) {
             rows.finish(pointer<float>(logp), pointer<float>(entropy), pointer<float>(sums), sums_stride,
                         pointer<const float>(grad_logp), pointer<const float>(grad_entropy), run(setting).transform);
           })
      .def("store_targets", [](const HeadRows& rows, const Strided& e, const Setting& setting) {
        rows.store_targets(matrix(e), run(setting));
      });
}

}  // namespace redit
