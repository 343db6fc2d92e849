// Attention of one token a sequence over paged keys and values (kernels/ops/paged_attention.py has the contract).
//
// A task is one head of one sequence: its keys go by in blocks, scores first, then one online softmax. The heads that
// share a key head follow each other, so that keys come from memory once and from the second cache after that.
#include <float.h>

#include "simd.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {
namespace {

constexpr int kBlock = 64;  // keys whose scores are held at once
constexpr int kWidest = 1024;  // of a head; the caller refuses more

template <typename T>
struct Pages {
  const T *keys, *values;
  int64_t tokens, key_heads, width;  // of a page, of a token, of a head

  // Where the `count` tokens from `first` on lie.
  void find(const int32_t* pages, int64_t first, int count, int64_t key_head, int64_t* rows) const {
    int64_t page = first / tokens, token = first % tokens;
    for (int i = 0; i < count; ++i) {
      rows[i] = ((pages[page] * tokens + token) * key_heads + key_head) * width;
      if (++token == tokens) token = 0, ++page;
    }
  }
};

struct Scoring {
  float scale, softcap;
};

template <typename T>
ALIGNFAST_INLINE F32 load_part(const T* from, int64_t left) {
  return left >= kLanes ? load(from) : load_first(from, int(left), 0.0f);
}

template <typename T>
float dot(const float* query, const T* key, int64_t width) {
  F32 total = {}, other = {};
  int64_t e = 0;
  for (; e + 2 * kLanes <= width; e += 2 * kLanes) {
    total = fma(load(query + e), load(key + e), total);
    other = fma(load(query + e + kLanes), load(key + e + kLanes), other);
  }
  for (; e < width; e += kLanes) total = fma(load(query + e), load_part(key + e, width - e), total);
  return sum(total + other);
}

// Scores of the `count` <= kBlock keys at `rows`, -inf behind them.
template <typename T>
void score_block(const float* query, const Pages<T>& in, const int64_t* rows, int count, Scoring scoring,
                 float* scores) {
  for (int i = 0; i < count; ++i) scores[i] = dot(query, in.keys + rows[i], in.width);
  for (int i = 0; i < kBlock; i += kLanes) {
    F32 x = load(scores + i) * scoring.scale;
    if (scoring.softcap) x = tanh(x / scoring.softcap) * scoring.softcap;
    store(scores + i, lane_numbers() + i < count ? x : splat(-INFINITY));
  }
}

// out[e] = keep * out[e] + sum over `count` values of p value[e], for kVectors vectors from `e` on.
template <int kVectors, typename T>
void add_values(const Pages<T>& in, const int64_t* rows, int count, const float* p, float keep, int64_t e, float* out) {
  F32 sums[kVectors];
  for (int j = 0; j < kVectors; ++j) sums[j] = load(out + e + j * kLanes) * keep;
  for (int i = 0; i < count; ++i) {
    const T* value = in.values + rows[i] + e;
    for (int j = 0; j < kVectors; ++j) {
      const int64_t left = in.width - e - j * kLanes;
      sums[j] = fma(splat(p[i]), kVectors == 1 ? load_part(value, left) : load(value + j * kLanes), sums[j]);
    }
  }
  for (int j = 0; j < kVectors; ++j) store(out + e + j * kLanes, sums[j]);
}

// out[e] = sum over keys of p value[e], over the sum of p; `query` and `out` are padded to whole vectors.
template <typename T>
void attend(const float* query, const Pages<T>& in, const int32_t* pages, int64_t key_head, int64_t first, int64_t end,
            Scoring scoring, float* out) {
  alignas(64) float scores[kBlock] = {};
  int64_t rows[kBlock];
  float largest = -FLT_MAX;  // from -inf, a block of -inf would give -inf - -inf
  double total = 0.0;
  for (; first < end; first += kBlock) {
    const int count = end - first < kBlock ? int(end - first) : kBlock;
    in.find(pages, first, count, key_head, rows);
    score_block(query, in, rows, count, scoring, scores);
    F32 highest = splat(largest), sums = {};
    for (int i = 0; i < kBlock; i += kLanes) highest = max(load(scores + i), highest);
    const float before = largest;
    largest = max_lane(highest);
    for (int i = 0; i < kBlock; i += kLanes) {
      const F32 p = exp(load(scores + i) - largest);
      store(scores + i, p);
      sums += p;
    }
    const float keep = expf(before - largest);
    total = total * keep + sum(sums);
    int64_t e = 0;
    for (; e + 4 * kLanes <= in.width; e += 4 * kLanes) add_values<4>(in, rows, count, scores, keep, e, out);
    for (; e < in.width; e += kLanes) add_values<1>(in, rows, count, scores, keep, e, out);
  }
  const float inverse = float(1.0 / total);
  for (int64_t e = 0; e < in.width; e += kLanes) store(out + e, load(out + e) * inverse);
}

template <typename T>
void attend_heads(Tensor<3> query, const Pages<T>& in, Tensor<2> pages, Tensor<1> lengths, Scoring scoring,
                  int64_t window, Tensor<3> out, int64_t threads) {
  const int64_t sequences = query.sizes[0], heads = query.sizes[1], group = heads / in.key_heads;
  const int32_t* length = static_cast<const int32_t*>(lengths.data);
  int64_t numbers = 0;
  for (int64_t s = 0; s < sequences; ++s) numbers += length[s] * heads * in.width;
  const auto task = [&](int64_t at) {
    const int64_t s = at / heads, head = at % heads;
    alignas(64) float row[kWidest], sums[kWidest];
    const T* from = static_cast<const T*>(query.data) + s * query.strides[0] + head * query.strides[1];
    for (int64_t e = 0; e < in.width; e += kLanes) {
      store(row + e, load_part(from + e, in.width - e));
      store(sums + e, F32{});
    }
    const int64_t first = window && length[s] > window ? length[s] - window : 0;
    attend(row, in, static_cast<const int32_t*>(pages.data) + s * pages.sizes[1], head / group, first, length[s],
           scoring, sums);
    T* to = static_cast<T*>(out.data) + at * in.width;
    for (int64_t e = 0; e < in.width; e += kLanes) {
      store_first(to + e, load(sums + e), int(in.width - e < kLanes ? in.width - e : kLanes));
    }
  };
  const int workers = threads_for(numbers, threads);
  if (workers == 1) {
    for (int64_t at = 0; at < sequences * heads; ++at) task(at);
    return;
  }
#pragma omp parallel for num_threads(workers) schedule(dynamic, group)
  for (int64_t at = 0; at < sequences * heads; ++at) task(at);
}

}  // namespace

// All contiguous but for the query, whose heads are.
static void paged_attention(Tensor<3> query, Tensor<4> keys, Tensor<4> values, Tensor<2> pages, Tensor<1> lengths,
                            double scale, int64_t window, double softcap, Tensor<3> out, int64_t threads) {
  with_dtype(query.dtype, [&](auto* type) {
    using T = __typeof__(*type);
    const Pages<T> in = {static_cast<const T*>(keys.data), static_cast<const T*>(values.data), keys.sizes[1],
                         keys.sizes[2], keys.sizes[3]};
    attend_heads(query, in, pages, lengths, {float(scale), float(softcap)}, window, out, threads);
  });
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(paged_attention)
