// The part of CUDA that csrc/cuda/ uses, for a plain C++ compiler: the keywords, the launch, the vector types, and
// the mathematical functions, correctly rounded or with a GPU's errors. In an include path before the toolkit's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define dynamic_shared emulated_shared

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// --- launching ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct EmulatedStream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline std::map<const void*, size_t> emulated_shared_limits;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid launch";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedLimit) return cudaErrorInvalidValue;
  emulated_shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto raised = emulated_shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = raised == emulated_shared_limits.end() ? 48 * 1024 : raised->second;
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y == 1 && grid.z == 1 && block.x >= 1 &&
                    block.x <= 1024 && block.x % emulator::kWarp == 0 && block.y == 1 && block.z == 1 &&
                    config->dynamicSmemBytes <= limit;
  if (!fits) return cudaErrorInvalidConfiguration;
  emulator::run(grid, block, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// --- within a warp ---

namespace emulator {

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
  return read<T>(exchange(mask, value, line)[source & (kWarp - 1)]);
}

}  // namespace emulator

#define __shfl_sync(mask, value, source) ::emulator::shuffle(mask, value, source, __LINE__)
#define __shfl_xor_sync(mask, value, bits) ::emulator::shuffle(mask, value, ::emulator::lane() ^ (bits), __LINE__)
// Past the last lane a lane gets its own value, as on the card.
#define __shfl_down_sync(mask, value, distance)                                                               \
  ::emulator::shuffle(mask, value,                                                                            \
                      ::emulator::lane() + (distance) < 32 ? ::emulator::lane() + (distance) : ::emulator::lane(), \
                      __LINE__)

// --- arithmetic ---

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
inline float __fmul_rn(float a, float b) { return a * b; }
using std::isinf;
using std::isnan;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

namespace emulator {

// False: functions are correctly rounded. True: they err as a GPU's may, by the bounds below.
inline bool approximate = false;

// `exact`, off by up to `ulps` units in the last place, by as much as the bits of the argument say.
inline float off_by(double exact, int ulps, float argument) {
  float value = static_cast<float>(exact);
  if (!approximate || !std::isfinite(value) || value == 0.0f || value == 1.0f) return value;
  const uint32_t mixed = (__float_as_uint(argument) * 2654435761u) >> 8;
  const int steps = static_cast<int>(mixed % (2 * ulps + 1)) - ulps;
  for (int i = 0; i < std::abs(steps); ++i) value = std::nextafterf(value, steps > 0 ? INFINITY : -INFINITY);
  return std::isfinite(value) ? value : static_cast<float>(exact);
}

// Bounds of the CUDA C++ Programming Guide, "Mathematical Functions"; of __expf for what is made of it: one product
// and one ex2.approx.
inline float exp_fast(float x) { return off_by(std::exp2(static_cast<double>(x * 1.44269502f)), 2, x); }
inline float exp_accurate(float x) { return off_by(std::exp(static_cast<double>(x)), 2, x); }
inline float log_accurate(float x) { return off_by(std::log(static_cast<double>(x)), 1, x); }
inline float log1p_accurate(float x) { return off_by(std::log1p(static_cast<double>(x)), 1, x); }
inline float expm1_accurate(float x) { return off_by(std::expm1(static_cast<double>(x)), 1, x); }
inline float tanh_accurate(float x) { return off_by(std::tanh(static_cast<double>(x)), 2, x); }

// An exact product, but for halfway cases a sum rounded once; fmaf itself is a call on machines without it.
inline float fused(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }

}  // namespace emulator

#define fmaf(a, b, c) ::emulator::fused(a, b, c)
#define expf(x) ::emulator::exp_accurate(x)
#define __expf(x) ::emulator::exp_fast(x)
#define logf(x) ::emulator::log_accurate(x)
#define log1pf(x) ::emulator::log1p_accurate(x)
#define expm1f(x) ::emulator::expm1_accurate(x)
#define tanhf(x) ::emulator::tanh_accurate(x)
