// Statistics of each row of logits and their gradient: kernels/ops/token_logps.py holds the formulas.
//
// A row is walked once, in blocks that stay in the L1 cache: a block is read and transformed, then summed against
// the largest value so far, while one to come is fetched. Sums within a block are float, two chains a lane, and
// double across blocks: one float sum was measured 9 times less exact than PyTorch's at V = 5003. The target is
// left out of the sums and joins at the end, which keeps logp exact near 0.
//
// x is the transformed logit, t the target, m the largest x over v != t.
#include "row.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

constexpr float kFar = -100.0f;    // e^-100 is 0 in float32, and 0 * -100 is 0 where 0 * -inf is NaN

enum Stat { kLogps, kLse, kEntropy, kMeanLogit, kIsTop1, kSumSqProbs, kStats };

struct Options {
  double scale, softcap, temperature;
  int64_t ignore_index, wanted;

  bool wants(Stat stat) const { return wanted >> stat & 1; }
  bool moments() const { return wants(kEntropy) || wants(kSumSqProbs); }
  LogitRow row(const Tensor<2>& logits, int64_t row) const { return {logits, row, scale, softcap, temperature}; }
};

// ---- forward ----

// Sums over a row, one class left out.
struct Others {
  float largest = -INFINITY;  // m
  double exps = 0;            // sum e^(x - m)
  double moment = 0;          // sum e^(x - m) (x - m)
  double squares = 0;         // sum e^(2 (x - m))
  double total = 0;           // sum x, nothing left out
  float left_out = 0;         // the x that was

  double log_sum() const { return largest == -INFINITY ? 0 : ::log(exps); }
};

template <bool moments, bool with_squares>
void add_block(const float* x, int n, const char* next, int item_size, Others& others) {
  const float m = others.largest == -INFINITY ? 0.0f : others.largest;
  F32 exps[2] = {}, moment[2] = {}, squares[2] = {};
  for (int i = 0; i < n; i += kStep) {
    for (int j = 0; j < 2; ++j) {
      const int at = i + j * kLanes;
      __builtin_prefetch(next + int64_t(at) * item_size);
      const F32 d = load(x + at) - m;
      const F32 e = exp(d);
      exps[j] += e;
      if (moments) {
        moment[j] = fma(e, max(splat(kFar), d), moment[j]);
        if (with_squares) squares[j] = fma(e, e, squares[j]);
      }
    }
  }
  for (int j = 0; j < 2; ++j) {
    others.exps += exact_sum(exps[j]);
    if (moments) {
      others.moment += exact_sum(moment[j]);
      others.squares += exact_sum(squares[j]);
    }
  }
}

// Sums count from the largest x; a larger one arrives.
void raise(Others& others, float largest) {
  if (!(largest > others.largest)) return;
  if (others.largest != -INFINITY) {
    const double step = double(others.largest) - largest;
    const double shrink = ::exp(step);
    others.moment = shrink == 0 ? 0 : shrink * (others.moment + step * others.exps);
    others.exps *= shrink;
    others.squares *= shrink * shrink;
  }
  others.largest = largest;
}

// One walk along the row; `left_out` is a class, or -1 for none.
template <bool capped, bool moments, bool with_squares>
Others sum_row(const LogitRow& row, int64_t left_out, bool with_total) {
  alignas(64) float x[kBlock];
  Others others;
  for (int64_t start = 0; start < row.classes; start += kBlock) {
    const int n = row.length(start);
    float largest = max_lane(read_logits<capped>(row, start, x));
    if (with_total) {
      for (int i = 0; i < n; ++i) others.total += x[i];
    }
    if (left_out >= start && left_out < start + n) {
      others.left_out = x[left_out - start];
      x[left_out - start] = largest = -INFINITY;
      for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    }
    raise(others, largest);
    if (others.largest == INFINITY) {  // inf - inf would make a NaN of it; only a NaN may
      for (int i = 0; i < n; ++i) others.exps += isnan(x[i]) ? x[i] : 1.0f;
    } else {
      add_block<moments, with_squares>(x, n, row.after(start), row.item_size, others);
    }
  }
  return others;
}

template <bool capped, bool moments, bool with_squares>
void forward_row(const LogitRow& row, int64_t target, const Options& options, float* stats, int64_t stride) {
  const Others others = sum_row<capped, moments, with_squares>(row, target, options.wants(kMeanLogit));
  const double m = others.largest, x_t = others.left_out;
  const bool has_nan = isnan(others.exps), no_others = m == -INFINITY && !has_nan;
  const double lse_others = has_nan ? NAN : m + others.log_sum();
  const double logp = -softplus(lse_others - x_t);
  const double added = softplus(x_t - lse_others);  // lse - lse_others, not by subtraction: it may be 1e-20
  double lse = x_t > lse_others ? x_t - logp : lse_others + added;
  if (isinf(x_t) && lse_others == x_t) lse = x_t;
  stats[kLogps * stride] = float(logp);
  stats[kLse * stride] = float(lse);
  const double p_t = isinf(lse) ? NAN : ::exp(logp);
  const double above = others.log_sum() + added;  // lse - m
  const double share = no_others ? 0 : isinf(lse) ? NAN : ::exp(-above);  // p over e^(x - m)
  if (options.wants(kEntropy)) {
    const double of_others = share == 0 ? 0 : share * (above * others.exps - others.moment);
    stats[kEntropy * stride] = float(of_others + (p_t == 0 ? 0 : -p_t * logp));
  }
  if (options.wants(kMeanLogit)) stats[kMeanLogit * stride] = float(others.total / row.classes);
  if (options.wants(kIsTop1)) stats[kIsTop1 * stride] = !has_nan && x_t >= m;
  if (options.wants(kSumSqProbs)) stats[kSumSqProbs * stride] = float(share * share * others.squares + p_t * p_t);
}

// ---- backward ----

// dx_v = p_v (by_exp + by_log (logp_v + entropy) + by_square (p_v - sum_squares)) + constant.
struct Slopes {
  float by_exp, by_log, by_square, constant;
  float entropy, sum_squares;
  float base, offset;   // logp_v = (x_v - base) + offset
  float dx_dz, outer;   // with a softcap dx/dz = dx_dz (1 - tanh^2)

  Slopes(const LogitRow& row, const Options& options, const float* stats, const float* dstats) {
    by_exp = dstats[kLse] - dstats[kLogps];
    by_log = options.wants(kEntropy) ? -dstats[kEntropy] : 0.0f;
    by_square = options.wants(kSumSqProbs) ? 2 * dstats[kSumSqProbs] : 0.0f;
    constant = options.wants(kMeanLogit) ? dstats[kMeanLogit] / row.classes : 0.0f;
    entropy = stats[kEntropy];
    sum_squares = stats[kSumSqProbs];
    dx_dz = float(options.scale / options.temperature);
    outer = row.outer;
  }

  // What is stored is rounded: lse = 72 to 4e-6, and so would be every p. The target's logit and log-prob are the
  // better pair where the log-prob is the smaller number; where both are large, the row is summed once more.
  template <bool capped>
  void choose_base(const LogitRow& row, float x_t, float logp_t, float lse) {
    const bool by_target = isfinite(x_t) && 2 * fabsf(logp_t) < fabsf(lse);
    base = by_target ? x_t : lse;
    offset = by_target ? logp_t : 0.0f;
    if (isfinite(lse) && fabsf(by_target ? 2 * logp_t : lse) >= 16) {
      const Others all = sum_row<capped, false, false>(row, -1, false);
      base = all.largest;
      offset = -float(all.log_sum());
    }
  }

  template <bool moments>
  F32 dx(F32 x, F32 by_exp) const {
    const F32 logp = (x - base) + offset;
    const F32 p = exp(logp);
    F32 factor = by_exp;
    if (moments) factor += by_log * (max(splat(kFar), logp) + entropy) + by_square * (p - sum_squares);
    return p * factor + constant;
  }
};

// dz of y = factor * z. The target has its own `by_exp` and `extra`, since logp's slope there is not minus p.
template <bool capped, bool moments>
F32 differentiate(F32 y, const Slopes& slopes, F32 by_exp, F32 extra) {
  if (!capped) return (slopes.dx<moments>(y, by_exp) + extra) * slopes.dx_dz;
  const Tanh tanh = tanh_and_slope(y);
  return (slopes.dx<moments>(tanh.value * slopes.outer, by_exp) + extra) * (tanh.slope * slopes.dx_dz);
}

template <bool capped, bool moments>
void backward_row(const LogitRow& row, int64_t target, const Options& options, const float* stats, const float* dstats,
                  const Tensor<2>& out, int64_t out_row) {
  alignas(64) float block[kBlock];
  float y_t;
  with_dtype(row.dtype, [&](auto* typed) {
    y_t = load_one(reinterpret_cast<decltype(typed)>(const_cast<char*>(row.logits)) + target) * row.factor;
  });
  const float x_t = capped ? tanh(splat(y_t))[0] * row.outer : y_t;
  Slopes slopes(row, options, stats, dstats);
  slopes.choose_base<capped>(row, x_t, stats[kLogps], stats[kLse]);
  for (int64_t start = 0; start < row.classes; start += kBlock) {
    const int n = row.length(start);
    read_logits<false>(row, start, block);
    for (int i = 0; i < n; i += kLanes) {
      __builtin_prefetch(row.after(start) + int64_t(i) * row.item_size);
      const F32 dz = differentiate<capped, moments>(load(block + i), slopes, splat(slopes.by_exp), F32{});
      store(block + i, dz);
    }
    if (target >= start && target < start + n) {
      const float dlogp = -float(::expm1(double(stats[kLogps]))) * dstats[kLogps];
      block[target - start] =
          differentiate<capped, moments>(splat(y_t), slopes, splat(dstats[kLse]), splat(dlogp))[0];
    }
    write_block(block, n, out, out_row, start);
  }
}

}  // namespace

// stats (6, T) from logits (T, V) with unit column stride and targets (T); a target outside the vocabulary gives NaN.
static void token_logps_forward(Tensor<2> logits, Tensor<1> targets, double scale, double softcap, double temperature,
                                int64_t ignore_index, int64_t wanted, Tensor<2> stats, int64_t threads) {
  const Options options{scale, softcap, temperature, ignore_index, wanted};
  const bool squares = options.wants(kSumSqProbs), moments = options.moments();
  const auto capped = squares   ? forward_row<true, true, true>
                      : moments ? forward_row<true, true, false>
                                : forward_row<true, false, false>;
  const auto plain = squares   ? forward_row<false, true, true>
                     : moments ? forward_row<false, true, false>
                               : forward_row<false, false, false>;
  const auto walk = softcap ? capped : plain;
  for_rows(logits.sizes[0], logits.sizes[1], threads, [&](int64_t row) {
    const int64_t target = static_cast<const int64_t*>(targets.data)[row * targets.strides[0]];
    float* out = static_cast<float*>(stats.data) + row * stats.strides[1];
    const bool bad = target < 0 || target >= logits.sizes[1];
    for (int stat = 0; stat < kStats; ++stat) {
      out[stat * stats.strides[0]] = bad && target != ignore_index ? NAN : 0.0f;
    }
    if (bad || target == ignore_index) return;
    walk(options.row(logits, row), target, options, out, stats.strides[0]);
  });
}

// out (T, V) = gradient of the logits, given stats and dstats (6, T). `out` may be `logits`: a block is read before it
// is written.
static void token_logps_backward(Tensor<2> logits, Tensor<1> targets, Tensor<2> stats, Tensor<2> dstats, double scale,
                                 double softcap, double temperature, int64_t ignore_index, int64_t wanted,
                                 Tensor<2> out, int64_t threads) {
  const Options options{scale, softcap, temperature, ignore_index, wanted};
  const auto walk = softcap ? (options.moments() ? backward_row<true, true> : backward_row<true, false>)
                            : (options.moments() ? backward_row<false, true> : backward_row<false, false>);
  for_rows(logits.sizes[0], logits.sizes[1], threads, [&](int64_t row) {
    const int64_t target = static_cast<const int64_t*>(targets.data)[row * targets.strides[0]];
    if (target == ignore_index) return fill_row(out, row, 0.0f);
    if (target < 0 || target >= logits.sizes[1]) return fill_row(out, row, NAN);
    float of_row[kStats], d_of_row[kStats];
    for (int stat = 0; stat < kStats; ++stat) {
      of_row[stat] = static_cast<const float*>(stats.data)[stat * stats.strides[0] + row * stats.strides[1]];
      d_of_row[stat] = static_cast<const float*>(dstats.data)[stat * dstats.strides[0] + row * dstats.strides[1]];
    }
    walk(options.row(logits, row), target, options, of_row, d_of_row, out, row);
  });
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(token_logps_forward)
ALIGNFAST_EXPORT(token_logps_backward)
