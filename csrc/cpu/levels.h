// Compiles the file REDIT_KERNELS for every instruction set, each in a namespace that names it, and hands out its table
// kKernels by level (see best_level). Included once by a .cpp file, inside an unnamed namespace.
//
// Compiler target attributes rather than a library such as Highway: no dependency, one binary, and GCC and clang both
// have them. A test tells from the symbols that no function outside these namespaces uses AVX.

#define REDIT_LANES 4
namespace kernels_baseline {
#include REDIT_KERNELS
}
#undef REDIT_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define REDIT_LANES 8
namespace kernels_avx2 {
#include REDIT_KERNELS
}
#undef REDIT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define REDIT_LANES 16
namespace kernels_avx512 {
#include REDIT_KERNELS
}
#undef REDIT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const auto& kernels([[maybe_unused]] int level) {
#if defined(__x86_64__)
  if (level == 2) return kernels_avx512::kKernels;
  if (level == 1) return kernels_avx2::kKernels;
#endif
  return kernels_baseline::kKernels;
}
