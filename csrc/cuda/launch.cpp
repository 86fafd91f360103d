// Launches on a device of this machine. Every error of the runtime is an exception with its name and sentence.

#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace redit::cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call of anybody would report it
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

const void* function_of(const std::string& name) {
  static const std::map<std::string, const void*> functions = [] {
    std::map<std::string, const void*> all;
    for (const Kernels& kernels : {advantages_kernels(), params_kernels(), token_loss_kernels(),
                                   token_loss_cluster_kernels(), linear_loss_kernels(), linear_loss_product_kernels()})
      for (const Kernel& kernel : kernels) all[kernel.name] = kernel.function;
    return all;
  }();
  const auto found = functions.find(name);
  if (found == functions.end()) throw std::invalid_argument("kernel must be one of this module's, got " + name);
  return found->second;
}

// The device current while it lives. It is set only where another one is, so that a process that has one device sets
// none.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Once a kernel and device: more than 48 KB of shared memory.
void allow_shared(const void* function, const Launch& launch, int device) {
  constexpr int kDefault = 48 << 10;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  if (launch.shared <= kDefault) return;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{function, device}];
  if (launch.shared <= most) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared),
        launch.kernel + ": cudaFuncSetAttribute of " + std::to_string(launch.shared) + " bytes");
  most = launch.shared;
}

struct Config {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Config(const Launch& launch, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = size_t(launch.shared);
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = launch.cluster > 1 ? 1 : 0;
  }
  Config(const Config&) = delete;  // config points into it
  Config& operator=(const Config&) = delete;
};

// 0 too where no code in this module is the device's: a build for sm_80 has no kernel with clusters.
int ask_resident(const Device& device, const Launch& launch, const void* function) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();
    return 0;
  }
  check(error, launch.kernel);
  if (attributes.maxThreadsPerBlock < launch.threads) return 0;
  allow_shared(function, launch, device.ordinal);
  int count = 0;
  if (launch.cluster > 1) {
    Config of(launch, nullptr);
    of.config.gridDim = dim3(static_cast<unsigned>(launch.cluster));
    check(cudaOccupancyMaxActiveClusters(&count, function, &of.config), launch.kernel);
    return count;
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, launch.threads, size_t(launch.shared)),
        launch.kernel);
  return count * device.multiprocessors;
}

}  // namespace

Device device_of(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "device " + std::to_string(index));
    return value;
  };
  return {index, 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), 0};
}

int resident_clusters(const Device& device, const Launch& launch) {
  if (launch.shared > device.shared_bytes || (launch.cluster > 1 && device.architecture < 90)) return 0;
  if (device.ordinal < 0) return device.clusters;
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  const void* function = function_of(launch.kernel);
  const std::tuple key{function, device.ordinal, launch.shared, launch.cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const Current current(device.ordinal);
  return known[key] = ask_resident(device, launch, function);
}

void launch(const Launches& launches, int device, void* stream) {
  const Current current(device);
  for (const Launch& launch : launches) {
    const void* function = function_of(launch.kernel);
    allow_shared(function, launch, device);
    const Config of(launch, static_cast<cudaStream_t>(stream));
    void* params[] = {const_cast<char*>(launch.params.data())};
    check(cudaLaunchKernelExC(&of.config, function, params), launch.kernel);
  }
}

}  // namespace redit::cuda
