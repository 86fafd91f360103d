// How a kernel's tensor copies see a matrix: boxes of it, stored in shared memory with the 128-byte swizzle.
#pragma once

#include "cuda/launch.h"
#include "shared/args.h"

namespace redit::device {

struct alignas(64) TensorMap {  // a CUtensorMap
  unsigned char bytes[128];
};

}  // namespace redit::device

namespace redit::cuda {

constexpr int kBoxColumns = 64;  // of two bytes: the swizzle's 128

// Of a matrix of bfloat16 whose address and row stride are multiples of 16 bytes. What lies outside it is zeros.
device::TensorMap tensor_map(const Matrix& x, int box_rows, const Device& device);

}  // namespace redit::cuda
