// Generalised advantage estimation: kernels/ops/gae.py has the formula and the two conventions for masked steps.
//
// A step maps what comes after it, the advantage and the value of the next step that counts, to its own. Such maps are
// affine and compose, so a row is a scan of maps from its end: a block owns a row and walks it in tiles; a thread
// composes its run of steps, the block scans the runs, and each thread then walks its run from what reaches it.
// Not in log space, where a discount of many steps underflows.
//
// I/O: rewards, values and mask are read once, advantages and returns written once: 17 bytes a step.
#include "launch.cuh"
#include "numbers.cuh"

namespace alignfast::cuda {
namespace {

constexpr int kRun = 8;            // steps of a thread in a tile
constexpr int kMostThreads = 256;  // a tile: 2,048 steps


struct GaeInputs {
  const float *rewards, *values, *bootstrap;
  const bool* mask;
  float *advantages, *returns;
  int64_t num_steps;
  float gamma, decay;
  bool decays;
};

struct Carry {
  float advantage, next;
};

// advantage = by_advantage A + by_next V + constant, and the next value is `next` where it `sets` it.
struct Map {
  float by_advantage = 1, by_next = 0, constant = 0, next = 0;
  int sets = 0;

  __device__ __forceinline__ Carry operator()(Carry after) const {
    return {by_advantage * after.advantage + by_next * after.next + constant, sets ? next : after.next};
  }
  // This map of what `later` gives.
  __device__ __forceinline__ Map of(const Map& later) const {
    Map both;
    both.by_advantage = by_advantage * later.by_advantage;
    both.by_next = by_advantage * later.by_next + (later.sets ? 0 : by_next);
    both.constant = by_advantage * later.constant + constant + (later.sets ? by_next * later.next : 0);
    both.next = sets ? next : later.next;
    both.sets = sets | later.sets;
    return both;
  }
  __device__ __forceinline__ Map of_lane_below(int distance) const {
    Map map;
    map.by_advantage = __shfl_down_sync(kWholeWarp, by_advantage, distance);
    map.by_next = __shfl_down_sync(kWholeWarp, by_next, distance);
    map.constant = __shfl_down_sync(kWholeWarp, constant, distance);
    map.next = __shfl_down_sync(kWholeWarp, next, distance);
    map.sets = __shfl_down_sync(kWholeWarp, sets, distance);
    return map;
  }
};

// What comes after each thread's run, from the maps of all runs and what comes after the tile. `warps` is shared.
__device__ __forceinline__ Carry scan(Map run, Carry carry, Map* warps) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Map later = run.of_lane_below(distance);
    if (lane + distance < kWarpSize) run = run.of(later);
  }
  if (lane == 0) warps[warp] = run;
  __syncthreads();
  for (int later = blockDim.x / kWarpSize - 1; later > warp; --later) carry = warps[later](carry);
  const Map behind = run.of_lane_below(1);
  return lane == kWarpSize - 1 ? carry : behind(carry);
}

__global__ void __launch_bounds__(kMostThreads) gae_kernel(GaeInputs in) {
  Map* warps = reinterpret_cast<Map*>(dynamic_shared);
  Carry* shared_carry = reinterpret_cast<Carry*>(warps + kMostThreads / kWarpSize);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * in.num_steps, tile = static_cast<int64_t>(blockDim.x) * kRun;
  Carry carry = {0, in.bootstrap[blockIdx.x]};
  for (int64_t first = (in.num_steps - 1) / tile * tile; first >= 0; first -= tile) {
    const int64_t begin = first + threadIdx.x * kRun;
    float rewards[kRun], values[kRun];
    bool counts[kRun], taken[kRun];
    Map run;
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
      const bool exists = begin + i < in.num_steps;
      counts[i] = exists && in.mask[row + begin + i];
      taken[i] = exists && (counts[i] || in.decays);
      rewards[i] = counts[i] ? in.rewards[row + begin + i] : 0;
      values[i] = counts[i] ? in.values[row + begin + i] : 0;
      if (!taken[i]) continue;
      Map step;
      step.by_advantage = in.decay;
      step.by_next = in.gamma;
      step.constant = rewards[i] - values[i];
      step.next = values[i];
      step.sets = 1;
      run = step.of(run);
    }
    Carry after = scan(run, carry, warps);
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
      if (taken[i]) {
        after.advantage = rewards[i] + in.gamma * after.next - values[i] + in.decay * after.advantage;
        after.next = values[i];
      }
      if (begin + i < in.num_steps) {
        in.advantages[row + begin + i] = counts[i] ? after.advantage : 0;
        in.returns[row + begin + i] = counts[i] ? after.advantage + values[i] : 0;
      }
    }
    if (threadIdx.x == 0) *shared_carry = after;
    __syncthreads();
    carry = *shared_carry;
  }
}

}  // namespace

// All contiguous and float32, but for the mask of bool.
static void gae(Tensor<2> rewards, Tensor<2> values, Tensor<2> mask, Tensor<1> bootstrap, double gamma, double decay,
                int64_t decays, Tensor<2> advantages, Tensor<2> returns, void* stream) {
  const GaeInputs inputs = {static_cast<const float*>(rewards.data),
                            static_cast<const float*>(values.data),
                            static_cast<const float*>(bootstrap.data),
                            static_cast<const bool*>(mask.data),
                            static_cast<float*>(advantages.data),
                            static_cast<float*>(returns.data),
                            values.sizes[1],
                            static_cast<float>(gamma),
                            static_cast<float>(decay),
                            decays != 0};
  const int64_t runs = ceil_div(inputs.num_steps, kRun * kWarpSize) * kWarpSize;
  const int threads = static_cast<int>(runs < kMostThreads ? runs : kMostThreads);
  launch("gae", gae_kernel, values.sizes[0], threads, kMostThreads / kWarpSize * sizeof(Map) + sizeof(Carry), stream,
         inputs);
}
ALIGNFAST_EXPORT(gae)

}  // namespace alignfast::cuda
