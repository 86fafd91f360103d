// Tensors come from Python as numbers, so every call asks here what its arguments are before anything is read or
// written: type, shape, strides, and that what it needs is there. A refusal names the argument: ValueError.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings/fields.h"

namespace redit {

using Address = uintptr_t;
// Address, Dtype (-1: none of them), rows, columns and their strides; one row for a vector; all 0 where absent.
using Tensor = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;
template <size_t count>
using Tensors = std::array<Tensor, count>;

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

}  // namespace redit
