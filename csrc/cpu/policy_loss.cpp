// Policy losses, a vector of tokens at once: loss, gradient and the sums of what is reported, in one pass.
//
// kernels/ops/policy_loss.py has the definition, ../policy_loss.h the token.
//
// I/O: five floats and a mask are read at most, two floats written: 29 bytes a token.
#include "../policy_loss.h"

#include "simd.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

struct PolicyInputs {
  const float *logps, *old_logps, *advantages, *refs, *scale;
  const uint8_t* mask;  // null: every token counts
  int64_t scale_step;   // 0: one number for all
};

// The first n of a vector of tokens; where n < kLanes the rest is 0.
F32 read(const float* from, int n) { return n == kLanes ? load(from) : load_first(from, n, 0.0f); }

I32 counted(const PolicyInputs& in, int64_t first, int n) {
  I32 counts = lane_numbers() < n;
  if (in.mask) {
    for (int i = 0; i < n; ++i) counts[i] = in.mask[first + i] ? -1 : 0;
  }
  return counts;
}

void walk_block(const PolicyInputs& in, const PolicyOptions& options, int64_t first, int64_t end, float* loss,
                float* dlogps, float* sums, int64_t sums_stride) {
  F32 totals[kPolicySums] = {};
  for (int64_t i = first; i < end; i += kLanes) {
    const int n = end - i < kLanes ? int(end - i) : kLanes;
    const I32 counts = counted(in, i, n);
    const F32 reference = options.has_reference ? read(in.refs + i, n) : F32{};
    const PolicyToken<VectorMath> token = policy_token<VectorMath>(
        read(in.logps + i, n), read(in.old_logps + i, n), read(in.advantages + i, n), reference, options);
    const F32 scale = in.scale_step ? read(in.scale + i, n) : splat(*in.scale);
    // masked numbers may be NaN, which a product with 0 would keep
    const F32 of_loss = counts ? token.loss * scale : F32{}, slope = counts ? token.slope * scale : F32{};
    if (n == kLanes) {
      store(loss + i, of_loss);
      store(dlogps + i, slope);
    } else {
      store_first(loss + i, of_loss, n);
      store_first(dlogps + i, slope, n);
    }
    for (int k = 0; k < kMaxRatio; ++k) totals[k] += counts ? token.sums[k] : F32{};
    totals[kMaxRatio] = max(totals[kMaxRatio], counts ? token.sums[kMaxRatio] : F32{});
  }
  for (int k = 0; k < kMaxRatio; ++k) sums[k * sums_stride] = sum(totals[k]);
  // a ratio is never negative: their sum is NaN where one of them is, and so then is the largest
  const float ratios = sums[kRatio * sums_stride];
  sums[kMaxRatio * sums_stride] = ratios == ratios ? max_lane(totals[kMaxRatio]) : ratios;
}

}  // namespace

// All contiguous but for the scale, float32 but for the mask of bool. No reference and no mask are empty tensors.
static void policy_loss(Tensor<1> logps_T, Tensor<1> old_logps_T, Tensor<1> advantages_T, Tensor<1> ref_logps_T,
                        Tensor<1> mask_T, Tensor<1> scale_T, double low, double high, double cap, double beta,
                        int64_t corrects_kl, Tensor<1> loss_T, Tensor<1> dlogps_T, Tensor<2> sums_KB, int64_t threads) {
  const PolicyInputs in = {static_cast<const float*>(logps_T.data),
                           static_cast<const float*>(old_logps_T.data),
                           static_cast<const float*>(advantages_T.data),
                           static_cast<const float*>(ref_logps_T.data),
                           static_cast<const float*>(scale_T.data),
                           mask_T.sizes[0] ? static_cast<const uint8_t*>(mask_T.data) : nullptr,
                           scale_T.strides[0]};
  const auto options = PolicyOptions::of(low, high, cap, beta, corrects_kl != 0, ref_logps_T.sizes[0] != 0);
  const int64_t tokens = logps_T.sizes[0], blocks = sums_KB.sizes[1];
  const int workers = threads_for(10 * tokens, threads);  // two exponentials a token: some ten times a copied number
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kPolicyBlock, end = first + kPolicyBlock < tokens ? first + kPolicyBlock : tokens;
    walk_block(in, options, first, end, static_cast<float*>(loss_T.data), static_cast<float*>(dlogps_T.data),
               static_cast<float*>(sums_KB.data) + block, blocks);
  }
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(policy_loss)
