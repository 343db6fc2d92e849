// How a kernel is launched: a one-dimensional grid, dynamic shared memory, errors as C++ exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../export.h"

namespace alignfast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A grid of no blocks launches nothing. Never waits for the device and allocates nothing, so a stream that is being
// captured into a CUDA graph may be passed.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            void* stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string(what) + ": " + std::to_string(blocks) +
                             " blocks are more than a grid holds, 2147483647; pass fewer rows at once");
  }
  if (shared_bytes > 48 * 1024) {  // beyond it a kernel has to ask
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          what);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace alignfast::cuda
