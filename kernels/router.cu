// router: from tokens to scores, choices and statistics, in one pass over x.
//   z[t, e] = Σ_d x[t, d] W[e, d]        x [T, D] bf16, W [E, D] f32, z in f32
//   scores[t, :] = z, softmax(z), 1 / (1 + exp(-z)) or max(z, 0)   [T, E] f32
//   log_sum_exp[t] = log Σ_e exp(z[t, e])                          [T] f32, whatever the score
//   choices[t, :] = the K experts of the highest score + bias, ascending    [T, K] int32. Ties go to the lower expert; NaN
//                   counts as -inf; so every choice is an expert, and none comes twice. No choice with K = 0.
//   first_non_finite = min(first_non_finite, the first t whose z holds NaN or ±inf)    [1] int32
//   partials [ceil(T / 128), 2 E + 2]   per 128 tokens: Σ scores[:, e]; tokens that chose e (K = 0: with scores[t, e] > 0);
//                                       Σ log_sum_exp²; Σ entropy of the softmax scores (other scores: 0)
// router_statistics: the sums of the partials; scores, lse² and entropy divided by T, the numbers of tokens not.
// The bias [E] takes part in the choice alone. Outputs are assigned. D a multiple of 8, E <= 256, K <= min(E, 16).
//
// z has the accuracy of an f32 product: x is exact in bf16, W is split into three bf16 terms in shared memory
// (common/router_tiles.cuh), so that tensor cores multiply exactly and add in f32. Plain FFMA would need 2·T·D·E / 60e12 s,
// more than the copy of x from E = 16 on.
//
// Deterministic: a block owns 128 tokens whatever the device, sums run in a fixed order, the flag is an integer minimum.
// Bytes: x once, 2·T·D; W from L2 once per 128 tokens, 4·E·D·ceil(T / 128); 4·T·(E + 1 + K) + 4·(2 E + 2)·ceil(T / 128)
// written; the bias once per token, 4·T·E, from L1. FLOPs on tensor cores: 6·T'·D'·E', each rounded up: T' to 128, D' to 64,
// E' to 16, 32, 64, 128 or 256.
// Floor: max(6·T·D·E / 790e12, (2·T·D + 4·T·(E + K + 1)) / 4.3e12) s; up to E = 64 the copy.
#include "common/router_mma.cuh"
#include "common/router_scores.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

// As many stages as fit twice (E <= 64) or once into a multiprocessor.
constexpr int forward_stages(int experts) { return experts == 16 ? 4 : experts == 32 || experts == 128 ? 3 : 2; }

template <int EXPERTS>
using ForwardTiles = RouterTiles<EXPERTS, 3, Major::K, forward_stages(EXPERTS), EXPERTS <= 64 ? 2 : 1>;

template <int EXPERTS>
union alignas(1024) RouterShared {
  RouterStages<ForwardTiles<EXPERTS>> stages;
  RouterSums<EXPERTS> sums;  // once the stages are read
};

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterThreads, ForwardTiles<EXPERTS>::kBlocksPerSm)
    router_kernel(const __grid_constant__ TensorMap x, const RouterForward forward) {
  if constexpr (!kCompilesHopper) return;
  using T = ForwardTiles<EXPERTS>;
  DYNAMIC_SHARED(RouterShared<EXPERTS>, s);
  const int first_token = static_cast<int>(blockIdx.x) * kRouterTokens;
  const int steps = (forward.w.width + kRouterDepth - 1) / kRouterDepth;
  init_stages<T>(s.stages);
  if (threadIdx.x < 128) {
    if constexpr (T::kBlocksPerSm == 1) setmaxnreg_dec<72>();
    load_stages<T>(s.stages, &x, forward.w, {first_token, 0}, steps);
  } else {
    if constexpr (T::kBlocksPerSm == 1) setmaxnreg_inc<216>();
    float logits[EXPERTS / 2];
    multiply_stages<T>(s.stages, logits, steps);
    finish_tokens<EXPERTS>(logits, forward, first_token, s.sums, threadIdx.x - 128);
  }
}

// ---- the same without wgmma
template <int EXPERTS>
using ForwardMmaTiles = RouterTiles<EXPERTS, EXPERTS == 256 ? 1 : 3, Major::K, 2, 1>;

template <int EXPERTS>
union alignas(1024) RouterMmaShared {
  RouterMmaStages<ForwardMmaTiles<EXPERTS>> stages;
  RouterSums<EXPERTS> sums;  // once the stages are read
};

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterMmaThreads, 1) router_mma_kernel(const bf16* x, const RouterForward forward) {
  if constexpr (!kCompilesAmpere) return;
  DYNAMIC_SHARED(RouterMmaShared<EXPERTS>, s);
  const int first_token = static_cast<int>(blockIdx.x) * kRouterTokens;
  const int steps = (forward.w.width + kRouterDepth - 1) / kRouterDepth;
  float logits[EXPERTS / 2];
  using T = ForwardMmaTiles<EXPERTS>;
  multiply_router<T, 3 / T::kTerms>(
      s.stages, logits, {x, nullptr, forward.w.width, forward.tokens}, forward.w, {first_token, 0}, steps);
  finish_tokens<EXPERTS>(logits, forward, first_token, s.sums, threadIdx.x);
}

constexpr int kStatisticsSlices = 32;
struct StatisticsShared {
  float sums[kStatisticsSlices][33];
};

// A block sums 32 columns: warp i takes partials i, i + 32, …, then the warps' sums are added in order.
__global__ void __launch_bounds__(32 * kStatisticsSlices)
    router_statistics_kernel(float* statistics, const float* partials, int64_t tokens, int blocks, int experts) {
  DYNAMIC_SHARED(StatisticsShared, s);
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, width = 2 * experts + 2;
  const int column = static_cast<int>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (column < width)
#pragma unroll 8
    for (int block = slice; block < blocks; block += kStatisticsSlices)
      sum += ld_global_readonly(partials + static_cast<int64_t>(block) * width + column);
  s.sums[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && column < width) {
    float total = 0;
    for (int i = 0; i < kStatisticsSlices; ++i) total += s.sums[i][lane];
    const bool count = experts <= column && column < 2 * experts;
    st_global(statistics + column, count ? total : total / static_cast<float>(tokens));
  }
}

int64_t token_blocks(int64_t tokens) { return (tokens + kRouterTokens - 1) / kRouterTokens; }

}  // namespace

#define REQUIRE_ROUTER_SIZES(launcher)                                                                   \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= kRouterMaxTokens, ROUTEGRAD_OUT_OF_RANGE);          \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kRouterMaxExperts, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status router_partials(uint64_t* floats, int64_t tokens, int32_t experts) {
  REQUIRE(router_partials, floats, floats != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_ROUTER_SIZES(router_partials);
  *floats = static_cast<uint64_t>(token_blocks(tokens)) * static_cast<uint64_t>(2 * experts + 2);
  return ROUTEGRAD_OK;
}

routegrad_status router_forward(float* scores, float* log_sum_exp, int32_t* choices, float* partials,
                                int32_t* first_non_finite, const void* x, const float* w, const float* selection_bias,
                                int64_t tokens, int32_t experts, int32_t hidden, int32_t choices_per_token,
                                int32_t score, routegrad_stream stream) {
  REQUIRE_POINTER(router_forward, scores);
  REQUIRE_POINTER(router_forward, log_sum_exp);
  if (choices_per_token != 0) REQUIRE_POINTER(router_forward, choices);
  REQUIRE_POINTER(router_forward, partials);
  REQUIRE(router_forward, first_non_finite, first_non_finite != nullptr, ROUTEGRAD_NULL_POINTER);  // an element of an array
  REQUIRE_POINTER(router_forward, x);
  REQUIRE_POINTER(router_forward, w);
  if (selection_bias) REQUIRE_POINTER(router_forward, selection_bias);
  REQUIRE_ROUTER_SIZES(router_forward);
  REQUIRE(router_forward, hidden, 1 <= hidden && hidden <= kRouterMaxHidden, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(router_forward, hidden);
  REQUIRE(router_forward, choices_per_token,
          0 <= choices_per_token && choices_per_token <= (experts < 16 ? experts : 16), ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_forward, score, ROUTEGRAD_SCORE_LOGITS <= score && score <= ROUTEGRAD_SCORE_RELU,
          ROUTEGRAD_OUT_OF_RANGE);
  TensorMap map;
  if (const auto status = router_map(&map, x, tokens, hidden)) return status;
  const RouterForward forward{scores,
                              log_sum_exp,
                              choices,
                              partials,
                              first_non_finite,
                              selection_bias,
                              {w, experts, hidden},
                              static_cast<int>(tokens),
                              experts,
                              choices_per_token,
                              score};
  const auto blocks = static_cast<uint32_t>(token_blocks(tokens));
  return with_padded_experts(experts, [&](auto padded) {
    constexpr int kExperts = padded;
    if constexpr (kForAmpere) {
      static_assert(shared_bytes<RouterMmaShared<kExperts>> <= 99 * 1024);
      if (!on_hopper())
        return launch(router_mma_kernel<kExperts>,
                      {dim3(blocks), kRouterMmaThreads, shared_bytes<RouterMmaShared<kExperts>>}, stream,
                      static_cast<const bf16*>(x), forward);
    }
    static_assert(shared_bytes<RouterShared<kExperts>> <= 227 * 1024 / ForwardTiles<kExperts>::kBlocksPerSm - 1024);
    return launch(router_kernel<kExperts>, {dim3(blocks), kRouterThreads, shared_bytes<RouterShared<kExperts>>}, stream,
                  map, forward);
  });
}

routegrad_status router_statistics(float* statistics, const float* partials, int64_t tokens, int32_t experts,
                                   routegrad_stream stream) {
  REQUIRE_POINTER(router_statistics, statistics);
  REQUIRE_POINTER(router_statistics, partials);
  REQUIRE_ROUTER_SIZES(router_statistics);
  const auto blocks = static_cast<uint32_t>((2 * experts + 2 + 31) / 32);
  return launch(router_statistics_kernel, {dim3(blocks), 32 * kStatisticsSlices, shared_bytes<StatisticsShared>}, stream,
                statistics, partials, tokens, static_cast<int>(token_blocks(tokens)), experts);
}

}  // namespace ROUTEGRAD_VARIANT
