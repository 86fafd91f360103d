// What a call on the CPU runs on.
#pragma once

#include <string>

#include "bindings/fields.h"
#include "rows.h"

namespace redit {

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

}  // namespace redit
