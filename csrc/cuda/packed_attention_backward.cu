// Gradient of packed attention: kernels/ops/packed_attention.py has the definition.
//
// Two kernels, which both compute the scores anew. For dquery a block owns a tile of queries and walks what they see;
// for dkey and dvalue it owns a tile of keys and walks the queries that read them: of its own segment and, from a
// prompt, of its answers. Nothing is added by atomics: the same input gives the same bits.
//
//     p_ij = exp(score_ij - base_i) factor_i    dscore_ij = p_ij (dout_i . v_j - delta_i)    delta_i = dout_i . out_i
//
// Letters: T tokens, H query heads, K key heads, E head width.
#include "attention_problem.cuh"

namespace alignfast::cuda {
namespace {

// Inputs that both backward kernels read. delta_HT = sum_e dout out is written by the first, read by the second.
template <typename T>
struct Backward {
  HeadRows<const T> query, key, value, out, dout;
  const float2* norms_HT;  // p = exp(score - x) * y
  float* delta_HT;
};

// norms.y is 1 for 16-bit queries.
template <typename T>
__device__ __forceinline__ float probability(float score, float2 norms) {
  const float p = exponential<T>(score - norms.x);
  return sizeof(T) == 4 ? p * norms.y : p;
}

// delta of a tile's rows, by the product that gives dout . v too: so the difference of the two is exactly 0 where one
// key has all the probability. The outputs pass through the memory of the key and the value tile.
template <typename T, int kWidth>
__device__ __forceinline__ void find_delta(const Problem& problem, const Backward<T>& in, const Tile& tile, int head,
                                           const T* dout_tile, T* out_tile, float* delta_of_rows) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kPassing = 2 * Shape::kColumns < Shape::kRows ? 2 * Shape::kColumns : Shape::kRows;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;
#pragma unroll 1
  for (int first = 0; first < Shape::kRows; first += kPassing) {
    __syncthreads();
    load_tile<T, kWidth, kPassing>(out_tile, in.out, tile.token() + first, tile.rows - first, head, problem.width,
                                   problem.vectors_fit);
    __syncthreads();
    if (warp_row < first || warp_row >= first + kPassing) continue;
    Fragment<kWarpRows> products;
    clear<kWarpRows>(products);
    multiply_transposed<T, kWidth, kWarpRows>(products, dout_tile + warp_row * Shape::kStride,
                                              out_tile + (warp_row - first) * Shape::kStride);
    for_elements<kWarpRows>(products, [&](int row, int column, float value) {
      if (row == column) delta_of_rows[warp_row + row] = value;
    });
  }
  __syncthreads();
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    query_gradient_kernel(Problem problem, Backward<T> in, HeadRows<T> dquery) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int head = blockIdx.x % problem.num_heads;
  const int key_head = head / (problem.num_heads / problem.num_key_heads);
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_heads);
  if (tile.rows <= 0) return;
  T* query_tile = reinterpret_cast<T*>(dynamic_shared);
  T* dout_tile = query_tile + kRows * kStride;
  T* key_tile = dout_tile + kRows * kStride;
  T* value_tile = key_tile + kColumns * kStride;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * kWarpRows;
  float* delta_of_rows = reinterpret_cast<float*>(value_tile + kColumns * kStride);
  load_tile<T, kWidth, kRows>(query_tile, in.query, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);
  load_tile<T, kWidth, kRows>(dout_tile, in.dout, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);
  find_delta<T, kWidth>(problem, in, tile, head, dout_tile, key_tile, delta_of_rows);
  const int64_t row_of_head = static_cast<int64_t>(head) * problem.num_tokens + tile.token();
  float2 norms[2] = {};
  float delta[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    if (row >= tile.rows) continue;
    norms[i] = in.norms_HT[row_of_head + row];
    delta[i] = delta_of_rows[row];
    if (lane % 4 == 0) in.delta_HT[row_of_head + row] = delta[i];
  }

  Fragment<kWidth> sums;
  clear<kWidth>(sums);
  walk_keys<kColumns>(problem, tile, [&](int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(key_tile, in.key, token, count, key_head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(value_tile, in.value, token, count, key_head, problem.width, problem.vectors_fit);
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> dots, dprobs;
    clear<kColumns>(dots);
    clear<kColumns>(dprobs);
    multiply_transposed<T, kWidth, kColumns>(dots, query_tile + warp_row * kStride, key_tile);
    multiply_transposed<T, kWidth, kColumns>(dprobs, dout_tile + warp_row * kStride, value_tile);
    const bool whole = count == kColumns && all_see(problem, tile.position(), kRows, position, kColumns);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
        const bool counts =
            whole || (column < count && sees(problem, tile.position() + warp_row + row, position + column));
        const Score score = score_of(problem, dots[n][i]);
        const float p = probability<T>(score.value, norms[i / 2]);
        dots[n][i] = counts ? p * (dprobs[n][i] - delta[i / 2]) * score.slope : 0;
      }
    }
    multiply_fragment<T, kWidth, kColumns>(sums, dots, key_tile);
  });
  if (warp_row >= tile.rows) return;
  store_fragment<T, kWidth>(sums, dquery, tile.token() + warp_row, tile.rows - warp_row, head, problem.width,
                            [&](int) { return problem.scale; });
}

// The `index`-th run of queries that read a tile of keys: the rest of its segment, then the answers of a prompt; false
// behind the last. Without a window the answers are one run, since each of their queries reads the whole prompt,
// whatever its position.
__device__ __forceinline__ bool find_readers(const Problem& problem, const Tile& tile, int index, Run& run) {
  const Segment& segment = tile.segment;
  const bool windowed = problem.window != INT32_MAX;
  // the first position that sees none of the tile's keys
  const int reach = windowed ? tile.position() + tile.rows - 1 + problem.window : INT32_MAX;
  if (index == 0) {
    run = {tile.token(), tile.position(), min(segment.length - tile.first, reach - tile.position())};
    return true;
  }
  const int s = tile.index + index, position = segment.length;  // of an answer's first token
  const bool is_answer = segment.prompt_length == 0 && s < problem.num_segments &&
                         problem.segments_S[s].prompt_length > 0 &&
                         problem.segments_S[s].prompt_start == segment.start;
  if (!is_answer || position >= reach || (index > 1 && !windowed)) return false;
  if (windowed) {
    run = {problem.segments_S[s].start, position, min(problem.segments_S[s].length, reach - position)};
    return true;
  }
  const int next_tree =
      first_index(problem.num_segments, [&](int i) { return problem.segments_S[i].prompt_start > segment.start; });
  const int end = next_tree < problem.num_segments ? problem.segments_S[next_tree].start : problem.num_tokens;
  run = {segment.start + segment.length, position, end - segment.start - segment.length};
  return true;
}

// kWithKeys, kWithValues: which of the two gradients. Widths above 128 take them one at a time, as the accumulators of
// both would not fit into registers.
template <typename T, int kWidth, bool kWithKeys, bool kWithValues>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    key_gradient_kernel(Problem problem, Backward<T> in, HeadRows<T> dkey, HeadRows<T> dvalue) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int key_head = blockIdx.x % problem.num_key_heads, group = problem.num_heads / problem.num_key_heads;
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_key_heads);
  if (tile.rows <= 0) return;
  T* key_tile = reinterpret_cast<T*>(dynamic_shared);
  T* value_tile = key_tile + kRows * kStride;
  T* query_tile = value_tile + kRows * kStride;
  T* dout_tile = query_tile + kColumns * kStride;
  float2* norms = reinterpret_cast<float2*>(dout_tile + kColumns * kStride);
  float* delta = reinterpret_cast<float*>(norms + kColumns);
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * kWarpRows;
  load_tile<T, kWidth, kRows>(key_tile, in.key, tile.token(), tile.rows, key_head, problem.width, problem.vectors_fit);
  load_tile<T, kWidth, kRows>(value_tile, in.value, tile.token(), tile.rows, key_head, problem.width,
                              problem.vectors_fit);

  Fragment<kWidth> key_sums, value_sums;
  clear<kWidth>(key_sums);
  clear<kWidth>(value_sums);
  const auto add = [&](int head, int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(query_tile, in.query, token, count, head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(dout_tile, in.dout, token, count, head, problem.width, problem.vectors_fit);
    const int thread = threadIdx.x;
    if (thread < count) {
      const int64_t row = static_cast<int64_t>(head) * problem.num_tokens + token + thread;
      norms[thread] = in.norms_HT[row];
      delta[thread] = in.delta_HT[row];
    }
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> dots, dprobs;
    clear<kColumns>(dots);
    clear<kColumns>(dprobs);
    multiply_transposed<T, kWidth, kColumns>(dots, key_tile + warp_row * kStride, query_tile);
    if (kWithKeys) multiply_transposed<T, kWidth, kColumns>(dprobs, value_tile + warp_row * kStride, dout_tile);
    const bool whole = count == kColumns && all_see(problem, position, kColumns, tile.position(), kRows);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
        const bool counts =
            whole || (column < count && sees(problem, position + column, tile.position() + warp_row + row));
        const Score score = score_of(problem, dots[n][i]);
        const float p = probability<T>(score.value, norms[column]);
        dots[n][i] = counts ? p : 0;
        dprobs[n][i] = counts ? p * (dprobs[n][i] - delta[column]) * score.slope : 0;
      }
    }
    if (kWithValues) multiply_fragment<T, kWidth, kColumns>(value_sums, dots, dout_tile);
    if (kWithKeys) multiply_fragment<T, kWidth, kColumns>(key_sums, dprobs, query_tile);
  };
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    Run run;
    for (int index = 0; find_readers(problem, tile, index, run); ++index) {
      for (int i = 0; i < run.count; i += kColumns) {
        add(head, run.token + i, run.position + i, min(kColumns, run.count - i));
      }
    }
  }
  const int token = tile.token() + warp_row, rows = tile.rows - warp_row;
  if (kWithKeys) {
    store_fragment<T, kWidth>(key_sums, dkey, token, rows, key_head, problem.width,
                              [&](int) { return problem.scale; });
  }
  if (kWithValues) {
    store_fragment<T, kWidth>(value_sums, dvalue, token, rows, key_head, problem.width, [](int) { return 1.0f; });
  }
}

}  // namespace

// norms_HT2 and delta_HT, which is workspace, are contiguous float32.
static void packed_attention_backward(Tensor<3> dout, Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<3> out,
                                      Tensor<3> norms_HT2, Tensor<2> segments_S4, double scale, int64_t window,
                                      double softcap, Tensor<2> delta_HT, Tensor<3> dquery, Tensor<3> dkey,
                                      Tensor<3> dvalue, void* stream) {
  Problem problem = problem_of(query, key, value, segments_S4, scale, window, softcap);
  problem.vectors_fit = problem.vectors_fit && on_vectors(dout) && on_vectors(out);
  with_kernel(query.dtype, problem.width, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = width;
    using Shape = TileShape<T, kWidth>;
    const Backward<T> inputs = {rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value),
                                rows_of<const T>(out), rows_of<const T>(dout), static_cast<const float2*>(norms_HT2.data),
                                static_cast<float*>(delta_HT.data)};
    const int64_t slots = num_slots<Shape::kRows>(problem.num_tokens, problem.num_segments);
    const size_t tiles = 2 * (Shape::kRows + Shape::kColumns) * Shape::kStride * sizeof(T);
    launch("packed_attention_backward: dquery", query_gradient_kernel<T, kWidth>, slots * problem.num_heads,
           Shape::kThreads, tiles + Shape::kRows * sizeof(float), stream, problem, inputs, rows_of<T>(dquery));
    const auto keys = [&](auto kernel) {
      launch("packed_attention_backward: dkey, dvalue", kernel, slots * problem.num_key_heads, Shape::kThreads,
             tiles + 3 * Shape::kColumns * sizeof(float), stream, problem, inputs, rows_of<T>(dkey),
             rows_of<T>(dvalue));
    };
    if constexpr (kWidth <= 128) {
      keys(key_gradient_kernel<T, kWidth, true, true>);
    } else {
      keys(key_gradient_kernel<T, kWidth, true, false>);
      keys(key_gradient_kernel<T, kWidth, false, true>);
    }
  });
}
ALIGNFAST_EXPORT(packed_attention_backward)

}  // namespace alignfast::cuda
