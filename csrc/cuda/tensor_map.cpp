// Tensor maps are the driver's own bytes, and its function comes from the driver that the runtime has loaded: the
// module links no libcuda.

#include "cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

namespace redit::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode driver_function() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error(std::string("the driver has no cuTensorMapEncodeTiled: ") + cudaGetErrorString(error));
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

}  // namespace

device::TensorMap tensor_map(const Matrix& x, int box_rows, const Device& device) {
  device::TensorMap map{};
  const int64_t step = 2 * x.row_stride;
  if (device.ordinal < 0) {  // for the interpreter: tests/ptx/tensor_cores.py
    const int64_t fields[] = {
        int64_t(reinterpret_cast<uintptr_t>(x.data)), x.rows, x.columns, step, box_rows, kBoxColumns};
    std::memcpy(map.bytes, fields, sizeof fields);
    return map;
  }
  const cuuint64_t sizes[] = {cuuint64_t(x.columns), cuuint64_t(x.rows)}, strides[] = {cuuint64_t(step)};
  const cuuint32_t box[] = {kBoxColumns, cuuint32_t(box_rows)}, every[] = {1, 1};
  CUtensorMap encoded;  // aligned as the driver wants it
  static_assert(sizeof encoded == sizeof map);
  const CUresult result = driver_function()(&encoded, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x.data, sizes, strides, box,
                                            every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled of " + std::to_string(x.rows) + " x " + std::to_string(x.columns) +
                             ", strides of " + std::to_string(step) + " bytes: CUresult " + std::to_string(result));
  std::memcpy(map.bytes, &encoded, sizeof map);
  return map;
}

}  // namespace redit::cuda
