// Pairwise losses on token log-probs laid end to end: sums, loss, rewards and the gradient of each token in one launch.
//
// A block does a pair: half of its threads sum the chosen completion, half the rejected, then all write gradients.
//
// I/O: reads each token's log-prob and writes its gradient once. Bytes are few: a launch is what it costs.
//
// Letters: N pairs, P tokens, 2N + 1 offsets: of chosen 0, rejected 0, chosen 1, ...; 5 outputs (PreferenceOutput).
#include "../preference_loss.h"

#include "launch.cuh"
#include "numbers.cuh"

namespace alignfast::cuda {
namespace {

constexpr int kSideThreads = 128;  // of each completion
constexpr int kSideWarps = kSideThreads / kWarpSize;

struct PairInputs {
  const float* logps_P;
  const int64_t* offsets;
  const float* ref_chosen_N;
  const float* ref_rejected_N;
  int64_t num_pairs;
  int code;
  double beta, label_smoothing;
};

// One side's sum, from the sums of its warps; the same order for each thread, so that all agree on the margin.
__device__ __forceinline__ double sum_of_warps(const double* sums_W) {
  double sum = 0;
  for (int warp = 0; warp < kSideWarps; ++warp) sum += sums_W[warp];
  return sum;
}

__global__ void __launch_bounds__(2 * kSideThreads) pair_kernel(PairInputs in, float* out_5N, float* dlogps_P) {
  double* sums_W = reinterpret_cast<double*>(dynamic_shared);
  const int64_t pair = blockIdx.x;
  const int side = threadIdx.x / kSideThreads, thread = threadIdx.x % kSideThreads;  // 0 chosen, 1 rejected
  const int64_t begin = in.offsets[2 * pair + side], end = in.offsets[2 * pair + side + 1];
  double sum = 0;
  for (int64_t i = begin + thread; i < end; i += kSideThreads) sum += in.logps_P[i];
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, bits);
  if (threadIdx.x % kWarpSize == 0) sums_W[threadIdx.x / kWarpSize] = sum;
  __syncthreads();

  const double logps[2] = {sum_of_warps(sums_W), sum_of_warps(sums_W + kSideWarps)};
  const double ratios[2] = {logps[0] - in.ref_chosen_N[pair], logps[1] - in.ref_rejected_N[pair]};
  double counts[2] = {1, 1};  // an empty completion counts as one token
  if (averages_tokens(in.code)) {
    for (int i = 0; i < 2; ++i) {
      const int64_t tokens = in.offsets[2 * pair + i + 1] - in.offsets[2 * pair + i];
      counts[i] = static_cast<double>(tokens > 1 ? tokens : 1);
    }
  }
  const PairLoss of_pair =
      pair_loss(in.code, ratios[0] / counts[0] - ratios[1] / counts[1], in.beta, in.label_smoothing);
  const float slope = static_cast<float>(side == 0 ? of_pair.slope / counts[0] : -of_pair.slope / counts[1]);
  for (int64_t i = begin + thread; i < end; i += kSideThreads) dlogps_P[i] = slope;
  if (threadIdx.x == 0) {
    const double outputs[5] = {of_pair.loss, in.beta * ratios[0], in.beta * ratios[1], logps[0], logps[1]};
    for (int i = 0; i < 5; ++i) out_5N[i * in.num_pairs + pair] = static_cast<float>(outputs[i]);
  }
}

}  // namespace

// All contiguous, float32 but for the int64 offsets.
static void preference_loss(Tensor<1> logps_P, Tensor<1> offsets, Tensor<1> ref_chosen_N, Tensor<1> ref_rejected_N,
                            int64_t code, double beta, double label_smoothing, Tensor<2> out_5N, Tensor<1> dlogps_P,
                            void* stream) {
  const PairInputs inputs = {static_cast<const float*>(logps_P.data), static_cast<const int64_t*>(offsets.data),
                             static_cast<const float*>(ref_chosen_N.data),
                             static_cast<const float*>(ref_rejected_N.data), out_5N.sizes[1], static_cast<int>(code),
                             beta, label_smoothing};
  launch("preference_loss", pair_kernel, inputs.num_pairs, 2 * kSideThreads, 2 * kSideWarps * sizeof(double), stream,
         inputs, static_cast<float*>(out_5N.data), static_cast<float*>(dlogps_P.data));
}
ALIGNFAST_EXPORT(preference_loss)

}  // namespace alignfast::cuda
