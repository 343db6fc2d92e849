// Attention over packed trees: kernels/ops/packed_attention.py has the definition, packed_attention_backward.cu the
// gradient.
//
// A block owns a tile of queries and walks the keys of its prompt and of its own segment in one online softmax.
//
// I/O: reads queries once and, for each tile of queries, the keys and values that it sees; writes out and norms once.
//
// Letters: T tokens, H query heads, K key heads, E head width.
#include "attention_problem.cuh"

namespace alignfast::cuda {
namespace {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// What the backward makes probabilities from: p = exp(score - x) * y. Adding the logarithm of the total would round it
// by more than a softmax of float32 errs; products of 16-bit numbers do not show that.
template <typename T>
__device__ __forceinline__ float2 norms_of(float largest, float total) {
  return sizeof(T) == 4 ? make_float2(largest, 1 / total) : make_float2(largest + logf(total), 1);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    forward_kernel(Problem problem, HeadRows<const T> query, HeadRows<const T> key, HeadRows<const T> value,
                   HeadRows<T> out, float2* norms_HT) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int head = blockIdx.x % problem.num_heads;
  const int key_head = head / (problem.num_heads / problem.num_key_heads);
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_heads);
  if (tile.rows <= 0) return;
  T* query_tile = reinterpret_cast<T*>(dynamic_shared);
  T* key_tile = query_tile + kRows * kStride;
  T* value_tile = key_tile + kColumns * kStride;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;
  load_tile<T, kWidth, kRows>(query_tile, query, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);

  Fragment<kWidth> sums;
  clear<kWidth>(sums);
  float largest[2] = {-INFINITY, -INFINITY}, exps[2] = {0, 0};  // of rows g and g + 8; exps: this lane's part
  walk_keys<kColumns>(problem, tile, [&](int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(key_tile, key, token, count, key_head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(value_tile, value, token, count, key_head, problem.width, problem.vectors_fit);
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> scores;
    clear<kColumns>(scores);
    multiply_transposed<T, kWidth, kColumns>(scores, query_tile + warp_row * kStride, key_tile);
    const bool whole = count == kColumns && all_see(problem, tile.position(), kRows, position, kColumns);
    const auto counts = [&](int row, int column) {
      return whole || (column < count && sees(problem, tile.position() + warp_row + row, position + column));
    };
    float top[2] = {largest[0], largest[1]};
    for_elements<kColumns>(scores, [&](int row, int column, float& score) {
      score = score_of(problem, score).value;
      if (counts(row, column)) top[row / 8] = fmaxf(top[row / 8], score);
    });
    float factor[2], base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = quad_max(top[i]);
      base[i] = top[i] == -INFINITY ? 0 : top[i];  // nothing seen yet: differences must not be NaN
      factor[i] = expf(largest[i] - base[i]);
      largest[i] = top[i];
      exps[i] *= factor[i];
    }
    for_elements<kColumns>(scores, [&](int row, int column, float& score) {
      score = counts(row, column) ? exponential<T>(score - base[row / 8]) : 0;
      exps[row / 8] += score;
    });
    for_elements<kWidth>(sums, [&](int row, int, float& sum) { sum *= factor[row / 8]; });
    multiply_fragment<T, kWidth, kColumns>(sums, scores, value_tile);
  });
  if (warp_row >= tile.rows) return;
  const float total[2] = {quad_sum(exps[0]), quad_sum(exps[1])};
  const int token = tile.token() + warp_row, rows = tile.rows - warp_row;
  store_fragment<T, kWidth>(sums, out, token, rows, head, problem.width, [&](int i) { return 1 / total[i]; });
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (lane % 4 == 0 && row < rows) {
      norms_HT[static_cast<int64_t>(head) * problem.num_tokens + token + row] = norms_of<T>(largest[i], total[i]);
    }
  }
}

}  // namespace

static void packed_attention_forward(Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<2> segments_S4,
                                     double scale, int64_t window, double softcap, Tensor<3> out, Tensor<3> norms_HT2,
                                     void* stream) {
  const Problem problem = problem_of(query, key, value, segments_S4, scale, window, softcap);
  with_kernel(query.dtype, problem.width, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = width;
    using Shape = TileShape<T, kWidth>;
    const size_t shared_bytes = (Shape::kRows + 2 * Shape::kColumns) * Shape::kStride * sizeof(T);
    launch("packed_attention_forward", forward_kernel<T, kWidth>,
           num_slots<Shape::kRows>(problem.num_tokens, problem.num_segments) * problem.num_heads, Shape::kThreads,
           shared_bytes, stream, problem, rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value),
           rows_of<T>(out), static_cast<float2*>(norms_HT2.data));
  });
}
ALIGNFAST_EXPORT(packed_attention_forward)

}  // namespace alignfast::cuda
