// What the bindings of rows share: tensors come as addresses, sizes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>

#include "rows.h"

namespace redit {

using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // address, rows, columns, strides
using Setting = std::tuple<int, double, float, float, bool, int, int>;    // type, transform, threads, level (-1: best)

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const Strided& in) {
  const auto& [address, rows, columns, row_stride, column_stride] = in;
  return {pointer<void>(address), rows, columns, row_stride, column_stride};
}

inline Run run(const Setting& in) {
  const auto& [type, slope, inner, outer, capped, threads, level] = in;
  if (level > best_level()) throw std::invalid_argument("this processor lacks the instruction set asked for");
  return {ElementType(type), {slope, inner, outer, capped}, threads, level < 0 ? best_level() : level};
}

}  // namespace redit
