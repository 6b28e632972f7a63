// expert_mean: the mean output of every expert and its moving average, the default vectors (Default MoE, eq. 10).
//   expert_sums          sums[e, :]    = Σ over the blocks of 64 rows of expert e of column_sums[block, :]
//                        masses[e, 0]  = Σ over the rows r of expert e of gates[row_token[r], e], or their number where
//                                        gates is null;  masses[e, 1] = their number
//   expert_mean_update   ê[e, :] ← β ê[e, :] + (1 − β) sums[e, :] / divisor[e], where the divisor is not 0
// Blocks of expert e: offsets[e] / 64 + e + b for b < ⌈rows of e / 64⌉, as grouped_down_forward wrote them; the others
// are not read. divisor = masses[e, 0] with ROUTEGRAD_WEIGHTING_SUM_P, masses[e, 1] with _PLAIN and _COUNT (they differ in
// what the rows were weighted with); so an expert without rows keeps its ê. Between the two, sums and masses may be added
// over ranks.
//   column_sums [R / 64 + E, D] f32, gates [T, E] f32, offsets [E + 1], row_token [R], sums [E, D], masses [E, 2], ê [E, D],
//   beta [1] in device memory.  1 <= E <= 256, D a multiple of 8. sums and masses are assigned, ê is changed.
//
// Deterministic: warp w of a block adds blocks w, w + 8, ... in order, then the eight warps are added in order; gates
// likewise, thread by thread.
// Bytes: sums 4·D·(R / 64 + 2 E) + 8·R + 16·E at most, the update 12·E·D (its three scalars apart). FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; at
// the paper's shapes (1 to 9 MB) the two launches cost as much.
#include "common/slots.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlockRows = 64;            // rows behind one line of column_sums
constexpr int kColumns = 128;             // of a block: 16 bytes a lane
constexpr int kBlocksAhead = 4, kRowsAhead = 8;  // loads of a thread under way together
constexpr int kMaxExperts = 256;

struct SumsShared {
  float4 column[kWarps][32];
  float mass[kWarps];
};

DEV float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Columns first_column … + 127 of one expert.
DEV void sum_columns(SumsShared& s, float* sums, const float* column_sums, int blocks, int first_column, int hidden) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = first_column + 4 * lane;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int block = warp; block < blocks; block += kWarps * kBlocksAhead) {
    float4 next[kBlocksAhead];
#pragma unroll
    for (int i = 0; i < kBlocksAhead; ++i) {
      const int64_t at = block + i * kWarps;
      next[i] = at < blocks && column < hidden
                    ? ld_global_readonly(reinterpret_cast<const float4*>(column_sums + at * hidden + column))
                    : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kBlocksAhead; ++i) sum = plus(sum, next[i]);
  }
  s.column[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < hidden) {
    for (int w = 1; w < kWarps; ++w) sum = plus(sum, s.column[w][lane]);
    st_global(reinterpret_cast<float4*>(sums + column), sum);
  }
}

// Σ gate and number of rows first … last − 1. `gates` starts at the expert's column.
DEV void sum_gates(SumsShared& s, float* masses, const float* gates, const int32_t* row_token, int first, int last,
                   int experts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0;
  if (gates) {
    for (int row = first + static_cast<int>(threadIdx.x); row < last; row += kThreads * kRowsAhead) {
      float next[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int at = row + i * kThreads;
        next[i] = at < last ? ld_global_readonly(gates + int64_t{ld_global_readonly(row_token + at)} * experts) : 0;
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) sum += next[i];
    }
    sum = sum_of_warp(sum);
    if (lane == 0) s.mass[warp] = sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const auto rows = static_cast<float>(last - first);
    for (int w = 1; gates && w < kWarps; ++w) sum += s.mass[w];
    st_global(masses, gates ? sum : rows);
    st_global(masses + 1, rows);
  }
}

// Grid (column tiles + 1, E): the last block of an expert sums its gates.
__global__ void __launch_bounds__(kThreads)
    expert_sums_kernel(float* sums, float* masses, const float* column_sums, const float* gates, const int32_t* offsets,
                       const int32_t* row_token, int experts, int hidden) {
  DYNAMIC_SHARED(SumsShared, s);
  const int e = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  const int first = ld_global_readonly(offsets + e), last = ld_global_readonly(offsets + e + 1);
  if (tile * kColumns < hidden) {
    const int64_t first_block = first / kBlockRows + e;
    sum_columns(s, sums + int64_t{e} * hidden, column_sums + first_block * hidden,
                (last - first + kBlockRows - 1) / kBlockRows, tile * kColumns, hidden);
  } else {
    sum_gates(s, masses + 2 * e, gates ? gates + e : nullptr, row_token, first, last, experts);
  }
}

// Grid (column tiles of 4 · kThreads, E).
__global__ void __launch_bounds__(kThreads)
    expert_mean_update_kernel(float* average, const float* sums, const float* masses, const float* beta, int hidden,
                              bool by_sum) {
  const int e = static_cast<int>(blockIdx.y);
  const int column = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 4;
  const float divisor = by_sum ? masses[2 * e] : masses[2 * e + 1], keep = *beta;
  if (column >= hidden || divisor == 0) return;
  float4* const at = reinterpret_cast<float4*>(average + int64_t{e} * hidden + column);
  const float4 old = ld_global(at);
  const float4 sum = ld_global_readonly(reinterpret_cast<const float4*>(sums + int64_t{e} * hidden + column));
  const auto mix = [&](float a, float s) { return keep * a + (1 - keep) * (s / divisor); };
  st_global(at, make_float4(mix(old.x, sum.x), mix(old.y, sum.y), mix(old.z, sum.z), mix(old.w, sum.w)));
}

uint32_t tiles(int columns, int width) { return static_cast<uint32_t>((columns + width - 1) / width); }

}  // namespace

routegrad_status expert_sums(float* sums, float* masses, const float* column_sums, const float* gates,
                             const int32_t* offsets, const int32_t* row_token, int64_t rows, int64_t tokens,
                             int32_t experts, int32_t hidden, routegrad_stream stream) {
  REQUIRE_POINTER(expert_sums, sums);
  REQUIRE_POINTER(expert_sums, masses);
  REQUIRE_POINTER(expert_sums, column_sums);
  if (gates) REQUIRE_POINTER(expert_sums, gates);
  REQUIRE_POINTER(expert_sums, offsets);
  REQUIRE_POINTER(expert_sums, row_token);
  REQUIRE(expert_sums, rows, 1 <= rows && rows <= INT32_MAX - kThreads * kRowsAhead, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(expert_sums, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(expert_sums, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(expert_sums, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(expert_sums, hidden);
  const dim3 grid(tiles(hidden, kColumns) + 1, static_cast<uint32_t>(experts));
  return launch(expert_sums_kernel, {grid, kThreads, shared_bytes<SumsShared>}, stream, sums, masses, column_sums, gates,
                offsets, row_token, experts, hidden);
}

routegrad_status expert_mean_update(float* average, const float* sums, const float* masses, const float* beta,
                                    int32_t experts, int32_t hidden, int32_t weighting, routegrad_stream stream) {
  REQUIRE_POINTER(expert_mean_update, average);
  REQUIRE_POINTER(expert_mean_update, sums);
  REQUIRE_POINTER(expert_mean_update, masses);
  REQUIRE(expert_mean_update, beta, beta != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(expert_mean_update, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(expert_mean_update, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(expert_mean_update, hidden);
  REQUIRE(expert_mean_update, weighting,
          ROUTEGRAD_WEIGHTING_PLAIN <= weighting && weighting <= ROUTEGRAD_WEIGHTING_COUNT, ROUTEGRAD_OUT_OF_RANGE);
  const dim3 grid(tiles(hidden, 4 * kThreads), static_cast<uint32_t>(experts));
  return launch(expert_mean_update_kernel, {grid, kThreads}, stream, average, sums, masses, beta, hidden,
                weighting == ROUTEGRAD_WEIGHTING_SUM_P);
}

}  // namespace ROUTEGRAD_VARIANT
