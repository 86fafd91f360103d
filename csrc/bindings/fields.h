// Options come from Python as named tuples; here they become the structs of shared/args.h, field by field.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "shared/args.h"

namespace redit {

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

}  // namespace redit
