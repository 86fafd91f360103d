// A launch as data. A plan turns addresses, sizes and strides into launches; launch() sends them to a device, and a
// test to an interpreter of PTX.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace redit::cuda {

struct Device {      // of redit_fast/backends/cuda/module.py
  int ordinal;       // -1: no device of this machine, but one that is described for an interpreter
  int architecture;  // 90: compute capability 9.0
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
  int clusters;      // of ordinal -1: how many clusters of any kernel it holds at once
};

struct Launch {
  std::string kernel;
  int64_t blocks;                // on grid axis 0
  int threads, cluster, shared;  // a block's, blocks of a cluster, dynamic bytes of a block
  std::string params;
};
using Launches = std::vector<Launch>;

template <class Params>
Launch launch_of(const char* kernel, int64_t blocks, int threads, int cluster, int shared, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096, "it travels in the launch");
  return {kernel, blocks, threads, cluster, shared, std::string(reinterpret_cast<const char*>(&params), sizeof params)};
}

Device device_of(int index);

// How many of the launch's clusters the device holds at once: 0 where it cannot run one.
int resident_clusters(const Device& device, const Launch& launch);

// On the stream, one after the other.
void launch(const Launches& launches, int device, void* stream);

// The kernels of each .cu file, by name.
struct Kernel {
  const char* name;
  const void* function;
};
using Kernels = std::vector<Kernel>;
Kernels advantages_kernels();
Kernels params_kernels();
Kernels token_loss_kernels();
Kernels token_loss_cluster_kernels();
Kernels linear_loss_kernels();
Kernels linear_loss_product_kernels();

}  // namespace redit::cuda
