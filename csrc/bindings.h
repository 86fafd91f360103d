// What the bindings share: tensors come as addresses, sizes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>

#include "rows.h"

namespace redit {

using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // address, rows, columns, strides
using Setting = std::tuple<int, double, float, float, bool, int, int>;    // type, transform, threads, level

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const Strided& in) {
  const auto& [address, rows, columns, row_stride, column_stride] = in;
  return {pointer<void>(address), rows, columns, row_stride, column_stride};
}

inline int checked(int level) {  // -1: best
  if (level > best_level()) throw std::invalid_argument("this processor lacks the instruction set asked for");
  return level < 0 ? best_level() : level;
}

inline Run run(const Setting& in) {
  const auto& [type, slope, inner, outer, capped, threads, level] = in;
  return {ElementType(type), {slope, inner, outer, capped}, threads, checked(level)};
}

}  // namespace redit
