// What the bindings share. Tensors come as numbers, so every call asks here what its arguments are before anything is
// read or written: type, shape, strides, and that what it needs is there. A refusal names the argument: ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "formats.h"
#include "rows.h"

namespace redit {

using Address = uintptr_t;
// Address, Dtype (-1: none of them), rows, columns and their strides; one row for a vector; all 0 where absent.
using Tensor = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;
using Setting = std::tuple<double, float, float, bool, int, int>;  // transform, threads, level

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

constexpr int kDtypes = 6;

inline std::string name_of(int dtype) {
  constexpr const char* names[kDtypes] = {"float32", "bfloat16", "float16", "float64", "int64", "bool"};
  return dtype >= 0 && dtype < kDtypes ? names[dtype] : "another type";
}

inline void require(bool right, const std::string& sentence) {
  if (!right) throw std::invalid_argument(sentence);
}

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
  require(fits && whole && there, std::string(name) + " must be " + name_of(int(dtype)) + " of " +
                                      shape_of(rows, columns) + ", got " + describe(in));
  return {reinterpret_cast<void*>(address), rows, columns, row_stride, column_stride};
}

// As `matrix`, each row's elements neighbours.
inline Matrix dense(const char* name, const Tensor& in, Dtype dtype, int64_t rows, int64_t columns) {
  const Matrix result = matrix(name, in, dtype, rows, columns);
  require(columns < 2 || result.column_stride == 1,
          std::string(name) + " must have each row's elements side by side, got " + describe(in));
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
  require(apart, std::string(name) + " is written, so its elements must not overlap, got strides " +
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
  require(!needed || given(in), std::string(name) + " must be given with " + other + ", got None");
}

inline ElementType element_type(const char* name, const Tensor& in) {
  const int type = std::get<1>(in);
  require(given(in) && type >= 0 && type <= int(Dtype::float16),
          std::string(name) + " must be float32, bfloat16 or float16, got " + describe(in));
  return ElementType(type);
}

inline Dtype dtype(ElementType type) { return Dtype(int(type)); }
static_assert(int(Dtype::float16) == int(ElementType::float16) && int(Dtype::bfloat16) == int(ElementType::bfloat16));

inline int checked_threads(int threads) {
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

inline int checked_level(int level) {  // -1: best
  require(level >= -1 && level <= best_level(),
          "level must be -1 or an instruction set that this processor has, at most " + std::to_string(best_level()) +
              ", got " + std::to_string(level));
  return level < 0 ? best_level() : level;
}

inline Run run(ElementType type, const Setting& in) {
  const auto& [slope, inner, outer, capped, threads, level] = in;
  return {type, {slope, inner, outer, capped}, checked_threads(threads), checked_level(level)};
}

}  // namespace redit
