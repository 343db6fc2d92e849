// One number of what each thread of a block has, for blocks that own a row of logits.
//
// Letters: W warps of a block.
#pragma once

#include "token_row.cuh"

namespace alignfast::cuda {

constexpr int kRowThreads = Variant<float, false, false, false, false>::kThreads;
constexpr int kRowWarps = kRowThreads / kWarpSize;

// `value` of all threads as one, known to each of them.
template <typename Value, typename Combine>
__device__ __forceinline__ Value over_block(Value value, Combine combine) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, bits));
  }
  Value* of_warps_W = reinterpret_cast<Value*>(dynamic_shared);
  __syncthreads();  // what is there has been read
  if (threadIdx.x % kWarpSize == 0) of_warps_W[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = of_warps_W[0];
  for (int warp = 1; warp < kRowWarps; ++warp) value = combine(value, of_warps_W[warp]);
  return value;
}

template <typename Value>
__device__ __forceinline__ Value sum_over_block(Value value) {
  return over_block(value, [](Value a, Value b) { return a + b; });
}

}  // namespace alignfast::cuda
