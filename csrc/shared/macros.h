// What the shared headers are written with: functions for the host and a GPU, and options that Python passes by name.
#pragma once

#ifdef __CUDACC__
#define REDIT_HD __host__ __device__ inline
#else
#define REDIT_HD inline
#endif

// An enum, and its names for the binding from the same list.
#define REDIT_CHOICE(Name, ...)    \
  enum class Name { __VA_ARGS__ }; \
  constexpr const char* names_of(Name) { return #__VA_ARGS__; }
