// Dithered group advantages on the CPU.
#pragma once

#include "rows.h"

namespace redit {

// group_size: of consecutive samples, where args.in.groups is null.
void group_advantages(const GroupAdvantages& args, int64_t group_size, const Processor& processor);

}  // namespace redit
