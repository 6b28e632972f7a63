// expert_mean: the mean output of every expert and its moving average, the default vectors (Default MoE, eq. 10).
//   expert_sums          sums[e, :]    = Σ over the blocks of 64 rows of expert e of column_sums[block, :]
//                        masses[e, 0]  = Σ over the rows r of expert e of gates[row_token[r], e], or their number where
//                                        gates is null;  masses[e, 1] = their number
//   expert_mean_update   ê[e, :] ← β ê[e, :] + (1 − β) sums[e, :] / divisor[e], where the divisor is not 0
//   expert_mean          both in one launch, sums and masses in no memory: the same bytes
// Blocks of expert e: offsets[e] / 64 + e + b for b < ⌈rows of e / 64⌉, as grouped_down_forward wrote them; the others
// are not read. divisor = masses[e, 0] with ROUTEGRAD_WEIGHTING_SUM_P, masses[e, 1] with _PLAIN and _COUNT (they differ in
// what the rows were weighted with); so an expert without rows keeps its ê. Between the first two, sums and masses may be
// added over ranks.
//   column_sums [R / 64 + E, D] f32, gates [T, E] f32, offsets [E + 1], row_token [R], sums [E, D], masses [E, 2], ê [E, D],
//   beta [1] in device memory.  1 <= E <= 256, D a multiple of 8. sums and masses are assigned, ê is changed.
//
// Deterministic: warp w of a block adds blocks w, w + 8, ... in order, then the eight warps are added in order; gates
// likewise, thread by thread.
// Bytes: sums 4·D·(R / 64 + 2 E) + 8·R + 16·E at most, the update 12·E·D (its three scalars apart), both in one
// 4·D·(R / 64 + 3 E) + 8·R + 8·E (every 128 columns read the gates again, from cache). FLOPs: none on tensor cores. Floor:
// bytes / 4.3e12 s; at the paper's shapes (1 to 9 MB) a launch costs as much.
#include "common/slots.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlockRows = 64;            // rows behind one line of column_sums
constexpr int kColumns = 128;             // of a block: 16 bytes a lane
constexpr int kBlocksAhead = 4, kRowsAhead = 8;  // loads of a thread under way together
constexpr int kMaxExperts = 256;

DEV float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// What the warps of a block summed.
struct WarpSums {
  float4 columns[kWarps][32];
  float gates[kWarps];

  DEV float4 all_columns(int lane) const {
    float4 sum = columns[0][lane];
    for (int w = 1; w < kWarps; ++w) sum = plus(sum, columns[w][lane]);
    return sum;
  }
  DEV float all_gates() const {
    float sum = gates[0];
    for (int w = 1; w < kWarps; ++w) sum += gates[w];
    return sum;
  }
};

// One expert's rows, and its blocks of them.
struct Expert {
  int e, first, last;

  DEV Expert(int e, const int32_t* offsets)
      : e(e), first(ld_global_readonly(offsets + e)), last(ld_global_readonly(offsets + e + 1)) {}

  // Each warp's sum of columns `column` … + 3 over the blocks.
  DEV void sum_columns(WarpSums& s, const float* column_sums, int column, int hidden) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks = (last - first + kBlockRows - 1) / kBlockRows;
    const int64_t first_block = first / kBlockRows + e;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int block = warp; block < blocks; block += kWarps * kBlocksAhead) {
      float4 next[kBlocksAhead];
#pragma unroll
      for (int i = 0; i < kBlocksAhead; ++i) {
        const int64_t at = block + i * kWarps;
        next[i] = at < blocks && column < hidden
                      ? ld_global_readonly(reinterpret_cast<const float4*>(column_sums + (first_block + at) * hidden + column))
                      : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBlocksAhead; ++i) sum = plus(sum, next[i]);
    }
    s.columns[warp][lane] = sum;
  }

  // Each warp's sum of the rows' gates.
  DEV void sum_gates(WarpSums& s, const float* gates, const int32_t* row_token, int experts) const {
    float sum = 0;
    for (int row = first + static_cast<int>(threadIdx.x); row < last; row += kThreads * kRowsAhead) {
      float next[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int at = row + i * kThreads;
        next[i] = at < last ? ld_global_readonly(gates + int64_t{ld_global_readonly(row_token + at)} * experts + e) : 0;
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) sum += next[i];
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) s.gates[threadIdx.x / 32] = sum;
  }
};

// ê ← β ê + (1 − β) sum / divisor in four columns.
DEV void move_average(float* average, float4 sum, float divisor, float keep) {
  float4* const at = reinterpret_cast<float4*>(average);
  const float4 old = ld_global(at);
  const auto mix = [&](float a, float s) { return keep * a + (1 - keep) * (s / divisor); };
  st_global(at, make_float4(mix(old.x, sum.x), mix(old.y, sum.y), mix(old.z, sum.z), mix(old.w, sum.w)));
}

// Grid (column tiles + 1, E): the last block of an expert sums its gates.
__global__ void __launch_bounds__(kThreads)
    expert_sums_kernel(float* sums, float* masses, const float* column_sums, const float* gates, const int32_t* offsets,
                       const int32_t* row_token, int experts, int hidden) {
  DYNAMIC_SHARED(WarpSums, s);
  const Expert expert(static_cast<int>(blockIdx.y), offsets);
  const int tile = static_cast<int>(blockIdx.x), column = tile * kColumns + threadIdx.x % 32 * 4;
  if (tile * kColumns < hidden) {
    expert.sum_columns(s, column_sums, column, hidden);
    __syncthreads();
    if (threadIdx.x < 32 && column < hidden)
      st_global(reinterpret_cast<float4*>(sums + int64_t{expert.e} * hidden + column), s.all_columns(threadIdx.x));
    return;
  }
  if (gates) expert.sum_gates(s, gates, row_token, experts);
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto rows = static_cast<float>(expert.last - expert.first);
    st_global(masses + 2 * expert.e, gates ? s.all_gates() : rows);
    st_global(masses + 2 * expert.e + 1, rows);
  }
}

// Grid (column tiles of 4 · kThreads, E).
__global__ void __launch_bounds__(kThreads)
    expert_mean_update_kernel(float* average, const float* sums, const float* masses, const float* beta, int hidden,
                              bool by_sum) {
  const int e = static_cast<int>(blockIdx.y);
  const int column = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 4;
  const float divisor = by_sum ? masses[2 * e] : masses[2 * e + 1];
  if (column >= hidden || divisor == 0) return;
  const int64_t at = int64_t{e} * hidden + column;
  move_average(average + at, ld_global_readonly(reinterpret_cast<const float4*>(sums + at)), divisor, *beta);
}

// Grid (column tiles, E): every block of an expert sums its gates, all but one of them from cache.
__global__ void __launch_bounds__(kThreads)
    expert_mean_kernel(float* average, const float* column_sums, const float* gates, const int32_t* offsets,
                       const int32_t* row_token, const float* beta, int experts, int hidden) {
  DYNAMIC_SHARED(WarpSums, s);
  const Expert expert(static_cast<int>(blockIdx.y), offsets);
  const int column = static_cast<int>(blockIdx.x) * kColumns + threadIdx.x % 32 * 4;
  if (expert.first == expert.last) return;
  if (gates) expert.sum_gates(s, gates, row_token, experts);
  expert.sum_columns(s, column_sums, column, hidden);
  __syncthreads();
  if (threadIdx.x >= 32 || column >= hidden) return;
  const float divisor = gates ? s.all_gates() : static_cast<float>(expert.last - expert.first);
  if (divisor != 0)
    move_average(average + int64_t{expert.e} * hidden + column, s.all_columns(threadIdx.x), divisor, *beta);
}

uint32_t tiles(int columns, int width) { return static_cast<uint32_t>((columns + width - 1) / width); }

}  // namespace

#define REQUIRE_COLUMN_SUMS(launcher)                                                                             \
  REQUIRE_POINTER(launcher, column_sums);                                                                         \
  REQUIRE_POINTER(launcher, offsets);                                                                             \
  REQUIRE_POINTER(launcher, row_token);                                                                           \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX - kThreads * kRowsAhead, ROUTEGRAD_OUT_OF_RANGE);        \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE)
#define REQUIRE_AVERAGE(launcher)                                                                                 \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);                     \
  REQUIRE(launcher, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);                            \
  REQUIRE_MULTIPLE_OF_8(launcher, hidden)
#define REQUIRE_WEIGHTING(launcher)                                                                               \
  REQUIRE(launcher, beta, beta != nullptr, ROUTEGRAD_NULL_POINTER);                                               \
  REQUIRE(launcher, weighting,                                                                                    \
          ROUTEGRAD_WEIGHTING_PLAIN <= weighting && weighting <= ROUTEGRAD_WEIGHTING_COUNT, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status expert_sums(float* sums, float* masses, const float* column_sums, const float* gates,
                             const int32_t* offsets, const int32_t* row_token, int64_t rows, int64_t tokens,
                             int32_t experts, int32_t hidden, routegrad_stream stream) {
  REQUIRE_POINTER(expert_sums, sums);
  REQUIRE_POINTER(expert_sums, masses);
  if (gates) REQUIRE_POINTER(expert_sums, gates);
  REQUIRE_COLUMN_SUMS(expert_sums);
  REQUIRE_AVERAGE(expert_sums);
  const dim3 grid(tiles(hidden, kColumns) + 1, static_cast<uint32_t>(experts));
  return launch(expert_sums_kernel, {grid, kThreads, shared_bytes<WarpSums>}, stream, sums, masses, column_sums, gates,
                offsets, row_token, experts, hidden);
}

routegrad_status expert_mean_update(float* average, const float* sums, const float* masses, const float* beta,
                                    int32_t experts, int32_t hidden, int32_t weighting, routegrad_stream stream) {
  REQUIRE_POINTER(expert_mean_update, average);
  REQUIRE_POINTER(expert_mean_update, sums);
  REQUIRE_POINTER(expert_mean_update, masses);
  REQUIRE_AVERAGE(expert_mean_update);
  REQUIRE_WEIGHTING(expert_mean_update);
  const dim3 grid(tiles(hidden, 4 * kThreads), static_cast<uint32_t>(experts));
  return launch(expert_mean_update_kernel, {grid, kThreads}, stream, average, sums, masses, beta, hidden,
                weighting == ROUTEGRAD_WEIGHTING_SUM_P);
}

routegrad_status expert_mean(float* average, const float* column_sums, const float* gates, const int32_t* offsets,
                             const int32_t* row_token, const float* beta, int64_t rows, int64_t tokens, int32_t experts,
                             int32_t hidden, int32_t weighting, routegrad_stream stream) {
  const bool by_sum = weighting == ROUTEGRAD_WEIGHTING_SUM_P;
  REQUIRE_POINTER(expert_mean, average);
  if (by_sum || gates) REQUIRE_POINTER(expert_mean, gates);
  REQUIRE_COLUMN_SUMS(expert_mean);
  REQUIRE_AVERAGE(expert_mean);
  REQUIRE_WEIGHTING(expert_mean);
  const dim3 grid(tiles(hidden, kColumns), static_cast<uint32_t>(experts));
  return launch(expert_mean_kernel, {grid, kThreads, shared_bytes<WarpSums>}, stream, average, column_sums,
                by_sum ? gates : nullptr, offsets, row_token, beta, experts, hidden);
}

}  // namespace ROUTEGRAD_VARIANT
