// Policy losses, a thread a token: loss, gradient and the sums of what is reported, in one launch.
//
// kernels/ops/policy_loss.py has the definition, ../policy_loss.h the token. A block's sums are of its 256 tokens,
// added in one order; they go out as partial sums, since blocks that meet in atomics would add in any.
//
// I/O: five floats and a mask are read at most, two floats written: 29 bytes a token.
#include "../policy_loss.h"

#include "launch.cuh"
#include "numbers.cuh"

namespace alignfast::cuda {
namespace {

constexpr int kWarps = kPolicyBlock / kWarpSize;

struct PolicyInputs {
  const float *logps, *old_logps, *advantages, *refs, *scale;
  const bool* mask;    // null: every token counts
  int64_t scale_step;  // 0: one number for all
  int64_t tokens;
};

__device__ __forceinline__ float combine(int k, float a, float b) { return k == kMaxRatio ? fmaxf(a, b) : a + b; }

__global__ void __launch_bounds__(kPolicyBlock)
    policy_kernel(PolicyInputs in, PolicyOptions options, float* loss, float* dlogps, float* sums_KB) {
  float* sums_KW = reinterpret_cast<float*>(dynamic_shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPolicyBlock + threadIdx.x;
  PolicyToken<FloatMath> token = {};
  if (i < in.tokens && (!in.mask || in.mask[i])) {  // masked numbers may be NaN
    const float reference = options.has_reference ? in.refs[i] : 0.0f, scale = in.scale[i * in.scale_step];
    token = policy_token<FloatMath>(in.logps[i], in.old_logps[i], in.advantages[i], reference, options);
    token.loss *= scale;
    token.slope *= scale;
  }
  if (i < in.tokens) {
    loss[i] = token.loss;
    dlogps[i] = token.slope;
  }
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) {
    float sum = token.sums[k];
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
      sum = combine(k, sum, __shfl_xor_sync(kWholeWarp, sum, bits));
    }
    if (threadIdx.x % kWarpSize == 0) sums_KW[k * kWarps + threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= kPolicySums) return;
  float sum = sums_KW[k * kWarps], ratios = 0;
  for (int warp = 1; warp < kWarps; ++warp) sum = combine(k, sum, sums_KW[k * kWarps + warp]);
  // a ratio is never negative: their sum is NaN where one of them is, and so then is the largest
  for (int warp = 0; warp < kWarps; ++warp) ratios += sums_KW[kRatio * kWarps + warp];
  sums_KB[static_cast<int64_t>(k) * gridDim.x + blockIdx.x] = k == kMaxRatio && ratios != ratios ? ratios : sum;
}

}  // namespace

// All contiguous but for the scale, float32 but for the mask of bool. No reference and no mask are empty tensors.
static void policy_loss(Tensor<1> logps_T, Tensor<1> old_logps_T, Tensor<1> advantages_T, Tensor<1> ref_logps_T,
                        Tensor<1> mask_T, Tensor<1> scale_T, double low, double high, double cap, double beta,
                        int64_t corrects_kl, Tensor<1> loss_T, Tensor<1> dlogps_T, Tensor<2> sums_KB, void* stream) {
  const PolicyInputs inputs = {static_cast<const float*>(logps_T.data),
                               static_cast<const float*>(old_logps_T.data),
                               static_cast<const float*>(advantages_T.data),
                               static_cast<const float*>(ref_logps_T.data),
                               static_cast<const float*>(scale_T.data),
                               mask_T.sizes[0] ? static_cast<const bool*>(mask_T.data) : nullptr,
                               scale_T.strides[0],
                               logps_T.sizes[0]};
  const auto options = PolicyOptions::of(low, high, cap, beta, corrects_kl != 0, ref_logps_T.sizes[0] != 0);
  launch("policy_loss", policy_kernel, sums_KB.sizes[1], kPolicyBlock, kPolicySums * kWarps * sizeof(float), stream,
         inputs, options, static_cast<float*>(loss_T.data), static_cast<float*>(dlogps_T.data),
         static_cast<float*>(sums_KB.data));
}
ALIGNFAST_EXPORT(policy_loss)

}  // namespace alignfast::cuda
