// Passes over parameters. level: see rows.h.
#pragma once

#include "shared/args.h"

namespace redit {

void squared_norm(const SquaredNorm& args, int threads, int level);

// params += scale * grads, then grads *= grad_factor.
void perturb(const Perturbation& args, int threads, int level);

// grads = (1 - ratio) * firsts + ratio * grads.
void combine(const Combination& args, int threads, int level);

// One AdamW step on the master where there is one, then params = nearest(master).
void adamw(const AdamwStep& args, int threads, int level);

}  // namespace redit
