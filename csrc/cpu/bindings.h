// What the bindings share. Tensors come as numbers and options as named tuples, so every call asks here what its
// arguments are before anything is read or written: type, shape, strides, and that what it needs is there. A refusal
// names the argument: ValueError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "rows.h"

namespace redit {

using Address = uintptr_t;
// Address, Dtype (-1: none of them), rows, columns and their strides; one row for a vector; all 0 where absent.
using Tensor = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;
template <size_t count>
using Tensors = std::array<Tensor, count>;

inline void require(bool right, const std::string& sentence) {
  if (!right) throw std::invalid_argument(sentence);
}

// The names of a REDIT_CHOICE, one after the other.
template <class Visit>
void for_each_name(std::string_view names, Visit visit) {
  for (int i = 0; !names.empty(); ++i) {
    const size_t end = std::min(names.find(", "), names.size());
    visit(i, names.substr(0, end));
    names.remove_prefix(std::min(end + 2, names.size()));
  }
}

inline std::string name_of(int dtype) {
  std::string found = "another type";
  for_each_name(names_of(Dtype{}), [&](int i, std::string_view name) {
    if (i == dtype) found = name;
  });
  return found;
}

// A field of a named tuple, which becomes a struct's: a number, a bool, or one of a REDIT_CHOICE by its name.
class Field {
 public:
  Field(PyObject* tuple, size_t index) : tuple_(tuple), index_(index) {}

  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>>
  operator T() const {
    PyObject* item = PyTuple_GET_ITEM(tuple_, Py_ssize_t(index_));
    if constexpr (std::is_enum_v<T>) {
      int found = -1;
      const char* text = PyUnicode_Check(item) ? PyUnicode_AsUTF8(item) : nullptr;
      for_each_name(names_of(T{}), [&](int i, std::string_view name) {
        if (text && name == text) found = i;
      });
      if (found < 0) refuse(std::string("one of ") + names_of(T{}));
      return T(found);
    } else if constexpr (std::is_same_v<T, bool>) {
      if (!PyBool_Check(item)) refuse("a bool");
      return item == Py_True;
    } else if constexpr (std::is_floating_point_v<T>) {
      if (!PyFloat_Check(item) && !PyLong_Check(item)) refuse("a number");
      const double number = PyFloat_AsDouble(item);
      if (number == -1 && PyErr_Occurred()) refuse("a number");
      return T(number);
    } else {
      if (!PyLong_Check(item) || PyBool_Check(item)) refuse("an int");
      using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
      Wide number;
      if constexpr (std::is_signed_v<T>)
        number = PyLong_AsLongLong(item);
      else
        number = PyLong_AsUnsignedLongLong(item);
      const bool out = (number == Wide(-1) && PyErr_Occurred()) || number != Wide(T(number));
      if (out) refuse("an int of " + std::to_string(8 * sizeof(T)) + " bits");
      return T(number);
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& wanted) const {
    PyErr_Clear();
    const auto tuple = pybind11::reinterpret_borrow<pybind11::tuple>(tuple_);
    const pybind11::tuple names = pybind11::getattr(tuple, "_fields", tuple);
    throw std::invalid_argument(std::string(pybind11::str(names[index_])) + " must be " + wanted + ", got " +
                                std::string(pybind11::repr(tuple[index_])));
  }

  PyObject* tuple_;
  size_t index_;
};

struct Anything {
  template <class T>
  operator T() const;
};

template <class T, size_t... i>
constexpr auto has_fields(std::index_sequence<i...>) -> decltype(T{(void(i), Anything{})...}, true) {
  return true;
}
template <class T>
constexpr bool has_fields(...) {
  return false;
}

template <class T, size_t most = 16>
constexpr size_t fields_of() {
  if constexpr (has_fields<T>(std::make_index_sequence<most>()))
    return most;
  else
    return fields_of<T, most - 1>();
}

template <class T, size_t... i>
T filled(PyObject* tuple, std::index_sequence<i...>) {
  return T{Field(tuple, i)...};
}

// A struct of shared/args.h from the named tuple that has its fields in its order.
template <class T>
T filled(const char* name, pybind11::handle tuple) {
  constexpr size_t count = fields_of<T>();
  require(PyTuple_Check(tuple.ptr()) && size_t(PyTuple_GET_SIZE(tuple.ptr())) == count,
          std::string(name) + " must be a named tuple of " + std::to_string(count) + " fields");
  return filled<T>(tuple.ptr(), std::make_index_sequence<count>());
}

template <class T>
constexpr Dtype dtype_of{};
template <>
constexpr Dtype dtype_of<float> = Dtype::float32;
template <>
constexpr Dtype dtype_of<double> = Dtype::float64;
template <>
constexpr Dtype dtype_of<int64_t> = Dtype::int64;
template <>
constexpr Dtype dtype_of<bool> = Dtype::boolean;

inline bool given(const Tensor& in) { return std::get<0>(in) || std::get<2>(in) || std::get<3>(in); }

inline std::string shape_of(int64_t rows, int64_t columns) {
  return std::to_string(rows) + " x " + std::to_string(columns);
}

inline std::string describe(const Tensor& in) {
  const auto& [address, dtype, rows, columns, row_stride, column_stride] = in;
  if (!given(in)) return "None";
  return name_of(dtype) + " of " + shape_of(rows, columns) + ", strides " + std::to_string(row_stride) + " and " +
         std::to_string(column_stride) + (address ? "" : ", without an address");
}

// `in` of any strides, of that type and shape.
inline Matrix matrix(const char* name, const Tensor& in, Dtype dtype, int64_t rows, int64_t columns) {
  const auto& [address, type, its_rows, its_columns, row_stride, column_stride] = in;
  const bool fits = type == int(dtype) && its_rows == rows && its_columns == columns;
  const bool whole = rows >= 0 && columns >= 0 && row_stride >= 0 && column_stride >= 0;
  const bool there = given(in) && (address || rows == 0 || columns == 0);
  if (!fits || !whole || !there)
    throw std::invalid_argument(std::string(name) + " must be " + name_of(int(dtype)) + " of " +
                                shape_of(rows, columns) + ", got " + describe(in));
  return {reinterpret_cast<void*>(address), rows, columns, row_stride, column_stride};
}

// As `matrix`, each row's elements neighbours.
inline Matrix dense(const char* name, const Tensor& in, Dtype dtype, int64_t rows, int64_t columns) {
  const Matrix result = matrix(name, in, dtype, rows, columns);
  if (columns >= 2 && result.column_stride != 1)
    throw std::invalid_argument(std::string(name) + " must have each row's elements side by side, got " + describe(in));
  return result;
}

// To be written: no element is another's.
inline Matrix output(const char* name, const Matrix& x) {
  const auto beyond = [](int64_t stride, int64_t count, int64_t inner) {  // in double: no overflow
    return inner > 0 && double(stride) > double(count - 1) * double(inner);
  };
  const bool apart = x.rows < 2      ? x.columns < 2 || x.column_stride > 0
                     : x.columns < 2 ? x.row_stride > 0
                                     : beyond(x.row_stride, x.columns, x.column_stride) ||
                                           beyond(x.column_stride, x.rows, x.row_stride);
  if (!apart)
    throw std::invalid_argument(std::string(name) + " is written, so its elements must not overlap, got strides " +
                                std::to_string(x.row_stride) + " and " + std::to_string(x.column_stride));
  return x;
}

template <class T>
T* vector(const char* name, const Tensor& in, int64_t count) {
  return static_cast<T*>(dense(name, in, dtype_of<std::remove_const_t<T>>, 1, count).data);
}

template <class T>
T* vector_or_null(const char* name, const Tensor& in, int64_t count) {
  return given(in) ? vector<T>(name, in, count) : nullptr;
}

inline void require_beside(const char* name, const Tensor& in, const char* other, bool needed) {
  if (needed && !given(in))
    throw std::invalid_argument(std::string(name) + " must be given with " + other + ", got None");
}

inline Dtype element_type(const char* name, const Tensor& in) {
  const int type = std::get<1>(in);
  if (!given(in) || type < 0 || type > int(Dtype::float16))
    throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16, got " + describe(in));
  return Dtype(type);
}

inline Processor processor_of(pybind11::handle in) {
  Processor result = filled<Processor>("processor", in);
  if (result.threads < 1)
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(result.threads));
  const int best = best_level();
  if (result.level < -1 || result.level > best)
    throw std::invalid_argument("level must be -1 or an instruction set that this processor has, at most " +
                                std::to_string(best) + ", got " + std::to_string(result.level));
  if (result.level < 0) result.level = best;
  return result;
}

inline Run run_of(Dtype type, pybind11::handle transform, pybind11::handle processor) {
  const Processor its = processor_of(processor);
  return {type, filled<TransformConstants>("transform", transform), its.threads, its.level};
}

// Rows of a token loss or of a chunk of the head.
inline RowResults row_results(const Tensors<3>& in, int64_t rows) {
  const auto& [logp, entropy, sums] = in;
  return {vector<float>("logp", logp, rows), vector_or_null<float>("entropy", entropy, rows),
          output("sums", dense("sums", sums, Dtype::float32, 3, rows))};
}

inline RowUpstream row_upstream(const Tensors<4>& in, int64_t rows) {
  const auto& [sums, grad_logp, grad_entropy, entropy] = in;
  require_beside("entropy", entropy, "grad_entropy", given(grad_entropy));
  return {dense("sums", sums, Dtype::float32, 3, rows), vector<const float>("grad_logp", grad_logp, rows),
          vector_or_null<const float>("grad_entropy", grad_entropy, rows),
          vector_or_null<const float>("entropy", entropy, rows)};
}

}  // namespace redit
