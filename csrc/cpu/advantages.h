// Dithered group advantages on the CPU.
#pragma once

#include "shared/args.h"

namespace redit {

void group_advantages(const GroupAdvantages& args, int threads);

}  // namespace redit
