// Elements in memory as float, bfloat16 or half; arithmetic always in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../export.h"

// All shared memory of a block: as many bytes as its launch asked for.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace alignfast::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kVectorBytes = 16;  // the widest load of a thread

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half(value);
}

// What the headers shared with csrc/cpu/ compute on.
struct FloatMath {
  using F = float;
  static __host__ __device__ __forceinline__ F number(float x) { return x; }
  static __host__ __device__ __forceinline__ F exp(F x) { return expf(x); }
};

__host__ __device__ __forceinline__ int misalignment(const void* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes);
}

// 16 bytes of elements, moved by one instruction.
template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T elements[kSize];

  static __device__ __forceinline__ Vector load(const T* aligned) {
    Vector vector;
    *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<const uint4*>(aligned);
    return vector;
  }

  // From anywhere, by the two aligned loads that the elements straddle. These also read up to 14 bytes before and
  // behind, which belong to whatever shares its 16 bytes with an element, and drop them.
  static __device__ __forceinline__ Vector load_across(const T* anywhere) {
    const int off = misalignment(anywhere);
    if (off == 0) return load(anywhere);
    const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(anywhere) - off);
    const uint4 low = aligned[0], high = aligned[1];
    uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = off & 8 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = off & 4 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = off & 2 ? __funnelshift_r(words[i], words[i + 1], 16) : words[i];
    Vector vector;
    *reinterpret_cast<uint4*>(&vector) = make_uint4(words[0], words[1], words[2], words[3]);
    return vector;
  }

  __device__ __forceinline__ void store(T* aligned) const {
    *reinterpret_cast<uint4*>(aligned) = *reinterpret_cast<const uint4*>(this);
  }
};

// Calls visit(T{}) with the type that the number names.
template <typename Visit>
void with_dtype(int64_t dtype, Visit visit) {
  switch (dtype) {
    case kFloat32: return visit(float{});
    case kBFloat16: return visit(__nv_bfloat16{});
    case kFloat16: return visit(__half{});
    default:
      throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                  std::to_string(dtype));
  }
}

}  // namespace alignfast::cuda
