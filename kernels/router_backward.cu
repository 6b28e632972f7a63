// router_backward: from gradients of the scores to gradients of logits, tokens and router weight. With p = scores [T, E],
// d = dscores [T, E] + dmean [E] / T and z = x Wᵀ as in router.cu,
//   dz [T, E] f32 = p (d - Σ_e p d)   softmax
//                   d                 logits
//                   p (1 - p) d       sigmoid
//                   d where p > 0     relu
//       + dlse2 · 2 / T · log_sum_exp · softmax(z), dlse2 [1] the gradient of mean log_sum_exp² (softmax and logits alone)
//   dx [T, D] bf16 = or += dz W
//   dW [E, D] f32  = or += dzᵀ x, in two steps: router_backward assigns one partial [E, D] per run of tokens to dw_partials,
//                    router_weight_gradient adds these in order
// dscores, dmean and dlse2 may be null: zero. scores and log_sum_exp are router_forward's, the latter read for dlse2 alone. D a multiple of 8, E <= 256.
//
// dx is as good as one rounding to bf16: dz and W as two bf16 terms each, the three larger of their four products, f32 sums.
// dW has the accuracy of an f32 product: x is exact, dz is split into three terms (common/router_tiles.cuh).
//
// Deterministic: a block owns 128 tokens of dx, or 128 columns of a run of tokens of dW; runs depend on T, D and E alone.
// Bytes, C = ceil(D / 128) column tiles, P runs:
//   dz, dx   reads scores, dscores and dmean, 4·T·E each (dmean from L1), for softmax twice (then from L1); 32·T for dlse2
//            (L1); W from L2, 4·E·D·ceil(T / 128); dx to accumulate, 2·T·D. Writes 4·T·E + 2·T·D
//   dW       reads 2·T·D, and dz from L2, 4·T·E·C; writes 4·P·E·D, then reads it, and writes 4·E·D (reads it to accumulate)
// FLOPs on tensor cores: 6·T'·D'·E' for dx and for dW, rounded up as in router.cu (dW: T' to 64, D' to 128).
// Floor: max(12·T·D·E / 790e12, (4·T·D + 2·T·D to accumulate + 12·T·E) / 4.3e12) s.
#include "common/epilogue_store_bf16.cuh"
#include "common/router_mma.cuh"
#include "common/router_tiles.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

struct RouterBackward {
  float* dz;
  const float *scores, *log_sum_exp, *dscores, *dmean, *dlse2;
  F32Matrix w;
  int tokens, experts, score, accumulate;
};

// ---- dz and dx
constexpr int input_stages(int experts) { return experts == 64 ? 4 : experts == 256 ? 2 : 3; }

template <int EXPERTS>
using InputTiles = RouterTiles<EXPERTS, 2, Major::K, input_stages(EXPERTS), EXPERTS <= 32 ? 2 : 1>;

template <int EXPERTS>
struct alignas(1024) InputShared {
  RouterStages<InputTiles<EXPERTS>> stages;  // x holds dx as it was
  bf16 out[2][2][kRouterBox];                // of each multiplying warpgroup
};

// Two neighbouring experts of a row.
struct Pair {
  float low, high;
};
DEV Pair load_pair(const float* row, int expert, int experts) {
  if (experts % 2 == 0 && expert < experts) {
    const float2 two = ld_global_readonly(reinterpret_cast<const float2*>(row + expert));
    return {two.x, two.y};
  }
  return {expert < experts ? ld_global_readonly(row + expert) : 0, expert + 1 < experts ? ld_global_readonly(row + expert + 1) : 0};
}

// One row of a quad: p and d of its elements, zero outside.
struct GradientRow {
  const RouterBackward& r;
  int token;
  bool valid;
  float scale, dot, lse, square_scale;  // 1 / T; Σ p d; its lse; d(mean lse²)/d(lse)

  DEV GradientRow(const RouterBackward& backward, int row)
      : r(backward),
        token(row),
        valid(row < backward.tokens),
        scale(1.0f / static_cast<float>(backward.tokens)),
        dot(0),
        lse(0),
        square_scale(0) {
    if (r.dlse2 && valid) {
      lse = ld_global_readonly(r.log_sum_exp + token);
      square_scale = ld_global_readonly(r.dlse2) * 2 * scale * lse;
    }
  }
  DEV Pair score(int expert) const {
    return valid ? load_pair(r.scores + static_cast<int64_t>(token) * r.experts, expert, r.experts) : Pair{0, 0};
  }
  DEV Pair gradient(int expert) const {
    Pair d{0, 0};
    if (!valid) return d;
    if (r.dscores) d = load_pair(r.dscores + static_cast<int64_t>(token) * r.experts, expert, r.experts);
    if (r.dmean) {
      const Pair mean = load_pair(r.dmean, expert, r.experts);
      d.low += mean.low * scale;
      d.high += mean.high * scale;
    }
    return d;
  }
  DEV float dz(float p, float d) const {
    switch (r.score) {
      case ROUTEGRAD_SCORE_SOFTMAX: return p * (d - dot + square_scale);
      case ROUTEGRAD_SCORE_SIGMOID: return p * (1 - p) * d;
      case ROUTEGRAD_SCORE_RELU: return p > 0 ? d : 0;
      default: return r.dlse2 ? d + square_scale * expf(p - lse) : d;
    }
  }
  DEV void store(int expert, float low, float high) const {
    if (!valid || expert >= r.experts) return;
    float* to = r.dz + static_cast<int64_t>(token) * r.experts + expert;
    if (r.experts % 2 == 0) {
      st_global(reinterpret_cast<float2*>(to), make_float2(low, high));
    } else {
      st_global(to, low);
      if (expert + 1 < r.experts) st_global(to + 1, high);
    }
  }
};

// dz of the warpgroup's 64 tokens: stored, and as two bf16 terms in the fragments of wgmma's A, 16 experts each.
template <int EXPERTS>
DEV void logit_gradients(uint32_t (&terms)[2][EXPERTS / 16][4], const RouterBackward& r, int first_token) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    GradientRow row(r, first_token + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h);
    const int first_expert = threadIdx.x % 4 * 2;
    if (r.score == ROUTEGRAD_SCORE_SOFTMAX) {
      float dot = 0;
#pragma unroll 4
      for (int expert = first_expert; expert < EXPERTS; expert += 8) {
        const Pair p = row.score(expert), d = row.gradient(expert);
        dot += p.low * d.low + p.high * d.high;
      }
      row.dot = quad_sum(dot);
    }
#pragma unroll
    for (int j = 0; j < EXPERTS / 8; ++j) {
      const int expert = first_expert + 8 * j;
      const Pair p = row.score(expert), d = row.gradient(expert);
      // Not read outside of the matrix: there p and d are zero, but exp(p - lse) is not.
      float low = expert < r.experts && row.valid ? row.dz(p.low, d.low) : 0;
      float high = expert + 1 < r.experts && row.valid ? row.dz(p.high, d.high) : 0;
      row.store(expert, low, high);
#pragma unroll
      for (int term = 0; term < 2; ++term) terms[term][j / 2][j % 2 * 2 + h] = take_term(low, high);
    }
  }
}

// dx tile by tile of 64 columns, each in f32 from nothing, plus what the stage holds where dx is added to.
template <int EXPERTS>
DEV void input_gradients(InputShared<EXPERTS>& s, const TensorMap& dx, const RouterBackward& r, int first_token, int steps) {
  using T = InputTiles<EXPERTS>;
  const int warpgroup = threadIdx.x / 128 - 1, barrier = 1 + warpgroup;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
  const bool issuer = threadIdx.x % 128 == 0;
  uint32_t dz[2][EXPERTS / 16][4];
  logit_gradients<EXPERTS>(dz, r, first_token);
  for (int i = 0; i < steps; ++i) {
    const Step<T> at(i);
    float d[32];
    pin_registers(d);
    mbar_wait(&s.stages.full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < EXPERTS / 16; ++k16) {
      const uint64_t high = wgmma_descriptor<Major::MN>(s.stages.terms[at.stage][0], k16, 64, EXPERTS);
      const uint64_t low = wgmma_descriptor<Major::MN>(s.stages.terms[at.stage][1], k16, 64, EXPERTS);
      wgmma_a_registers<64, Major::MN>(d, dz[0][k16], high, k16 > 0);
      wgmma_a_registers<64, Major::MN>(d, dz[1][k16], high, true);
      wgmma_a_registers<64, Major::MN>(d, dz[0][k16], low, true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    if (r.accumulate) {
      const bf16* before = s.stages.x[at.stage] + warpgroup * kRouterBox;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_row + lane / 4 + 8 * h;
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(before + row * 64 + (j ^ (row & 7)) * 8 + lane % 4 * 2);
          d[4 * j + 2 * h] += low_bf16(pair);
          d[4 * j + 2 * h + 1] += high_bf16(pair);
        }
    }
    __syncwarp();  // lane 0 speaks for lanes that have read
    if (lane == 0) mbar_arrive(&s.stages.empty[at.stage]);
    bf16* out = s.out[warpgroup][i % 2];
    if (issuer) bulk_wait_read<1>();  // the store that read this buffer is done with it
    named_bar_sync(barrier, 128);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int row = warp_row + lane % 16;
      stmatrix_x4(out + row * 64 + ((j + lane / 16) ^ (row & 7)) * 8, pack_bf16(d[4 * j], d[4 * j + 1]),
                  pack_bf16(d[4 * j + 2], d[4 * j + 3]), pack_bf16(d[4 * j + 4], d[4 * j + 5]),
                  pack_bf16(d[4 * j + 6], d[4 * j + 7]));
    }
    fence_proxy_async();
    named_bar_sync(barrier, 128);
    if (issuer) {
      tma_store_3d(&dx, out, i * kRouterDepth, first_token, 0);  // clips rows past T and columns past D
      bulk_commit();
    }
  }
  if (issuer) bulk_wait_read<0>();
}

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterThreads, InputTiles<EXPERTS>::kBlocksPerSm)
    router_input_gradient_kernel(const __grid_constant__ TensorMap dx, const RouterBackward backward) {
  if constexpr (!kCompilesHopper) return;
  using T = InputTiles<EXPERTS>;
  DYNAMIC_SHARED(InputShared<EXPERTS>, s);
  const int first_token = static_cast<int>(blockIdx.x) * kRouterTokens;
  const int steps = (backward.w.width + kRouterDepth - 1) / kRouterDepth;
  init_stages<T>(s.stages);
  if (threadIdx.x < 128) {
    if constexpr (T::kBlocksPerSm == 1) setmaxnreg_dec<72>();
    load_stages<T>(s.stages, backward.accumulate ? &dx : nullptr, backward.w, {first_token, 0}, steps);
  } else {
    if constexpr (T::kBlocksPerSm == 1) setmaxnreg_inc<216>();
    input_gradients<EXPERTS>(s, dx, backward, first_token + (static_cast<int>(threadIdx.x) / 128 - 1) * 64, steps);
  }
}

// d += what is there of 64 columns.
[[maybe_unused]] DEV void add_before(float (&d)[32], const Bf16Output& dx, const Fragment& at, int column) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int place = column + at.column(j);
      if (at.local_row(h) >= at.rows || place >= dx.width) continue;
      const uint32_t pair =
          ld_global(reinterpret_cast<const uint32_t*>(dx.out + static_cast<int64_t>(at.row(h)) * dx.width + place));
      d[4 * j + 2 * h] += low_bf16(pair);
      d[4 * j + 2 * h + 1] += high_bf16(pair);
    }
}

// The same without wgmma.
template <int EXPERTS>
struct alignas(1024) InputMmaShared {
  bf16 terms[2][InputTiles<EXPERTS>::kElements];
  MmaStaging::Buffers staging[2];  // of each warpgroup
};

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterMmaThreads, 1)
    router_input_gradient_mma_kernel(const __grid_constant__ Bf16Output dx, const RouterBackward r) {
  if constexpr (!kCompilesAmpere) return;
  using T = InputTiles<EXPERTS>;
  DYNAMIC_SHARED(InputMmaShared<EXPERTS>, s);
  const int warpgroup = threadIdx.x / 128, first_token = static_cast<int>(blockIdx.x) * kRouterTokens + 64 * warpgroup;
  const Fragment at({0, 0, first_token, r.tokens - first_token, 0, 0, 0}, 0, false);
  MmaStaging staging(s.staging[warpgroup], warpgroup);
  uint32_t dz[2][EXPERTS / 16][4];
  logit_gradients<EXPERTS>(dz, r, first_token);
  MatrixTile<T> tile;
  tile.fetch(r.w, 0, 0);
  for (int column = 0; column < r.w.width; column += kRouterDepth) {
    __syncthreads();  // the terms before are read
    tile.store(s.terms, 0, r.w, 0, column);
    __syncthreads();
    tile.fetch(r.w, 0, column + kRouterDepth);  // past the last column: nothing
    float d[32] = {};
#pragma unroll
    for (int k16 = 0; k16 < EXPERTS / 16; ++k16) {
      uint32_t high[4][4], low[4][4];
      load_fragments_b<Major::MN>(high, s.terms[0], EXPERTS, 0, 16 * k16);
      load_fragments_b<Major::MN>(low, s.terms[1], EXPERTS, 0, 16 * k16);
      mma_row(d, dz[0][k16], high);
      mma_row(d, dz[1][k16], high);
      mma_row(d, dz[0][k16], low);
    }
    if (r.accumulate) add_before(d, dx, at, column);
    dx.store<64>(at, column, 0, staging, [&](int j, int h) { return pack_bf16(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]); });
  }
}

// ---- dW
constexpr int weight_stages(int experts) { return experts == 128 ? 3 : 2; }

template <int EXPERTS>
using WeightTiles = RouterTiles<EXPERTS, 3, Major::MN, weight_stages(EXPERTS), EXPERTS <= 64 ? 2 : 1>;

// How the tokens are cut into runs: enough blocks for the multiprocessors of a large GPU, the same on every device.
struct TokenRuns {
  int columns;  // tiles of 128 columns
  int tiles;    // of 64 tokens, a run
  int count;
};
TokenRuns cut_tokens(int64_t tokens, int experts, int hidden) {
  const int columns = (hidden + 127) / 128, blocks = experts <= 64 ? 256 : 128;
  const int wanted = blocks / columns > 1 ? blocks / columns : 1;
  const auto tiles = static_cast<int>((tokens + 63) / 64);
  const int share = (tiles + wanted - 1) / wanted, run = share < 4 ? 4 : share;
  return {columns, run, (tiles + run - 1) / run};
}

// By the warps that multiplied, 16 columns each.
template <int EXPERTS>
DEV void store_partial(float* partials, const float (&d)[EXPERTS / 2], int experts, int hidden, int first_column,
                       int warp) {
  float* partial = partials + static_cast<int64_t>(blockIdx.y) * experts * hidden;
#pragma unroll
  for (int i = 0; i < EXPERTS / 2; ++i) {
    const int expert = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    const int column = first_column + warp * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    if (expert < experts && column < hidden) st_global(partial + static_cast<int64_t>(expert) * hidden + column, d[i]);
  }
}

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterThreads, WeightTiles<EXPERTS>::kBlocksPerSm)
    router_weight_partials_kernel(float* partials, const __grid_constant__ TensorMap x, const F32Matrix dz, int hidden,
                                  int run_tiles) {
  if constexpr (!kCompilesHopper) return;
  using T = WeightTiles<EXPERTS>;
  DYNAMIC_SHARED(RouterStages<T>, s);
  const int first_token = static_cast<int>(blockIdx.y) * run_tiles * 64, first_column = static_cast<int>(blockIdx.x) * 128;
  const int left = (dz.height - first_token + 63) / 64, steps = left < run_tiles ? left : run_tiles;
  init_stages<T>(s);
  if (threadIdx.x < 128) {
    load_stages<T>(s, &x, dz, {first_token, first_column}, steps);
  } else {
    float d[EXPERTS / 2];  // [64 columns, EXPERTS]
    multiply_stages<T>(s, d, steps);
    store_partial<EXPERTS>(partials, d, dz.width, hidden, first_column, static_cast<int>(threadIdx.x) / 32 - 4);
  }
}

// The same without wgmma.
template <int EXPERTS>
using WeightMmaTiles = RouterTiles<EXPERTS, EXPERTS == 256 ? 1 : 3, Major::MN, 2, 1>;

template <int EXPERTS>
__global__ void __launch_bounds__(kRouterMmaThreads, 1)
    router_weight_partials_mma_kernel(float* partials, const bf16* x, const F32Matrix dz, int hidden, int run_tiles) {
  if constexpr (!kCompilesAmpere) return;
  using T = WeightMmaTiles<EXPERTS>;
  DYNAMIC_SHARED(RouterMmaStages<T>, s);
  const int first_token = static_cast<int>(blockIdx.y) * run_tiles * 64, first_column = static_cast<int>(blockIdx.x) * 128;
  const int left = (dz.height - first_token + 63) / 64, steps = left < run_tiles ? left : run_tiles;
  float d[EXPERTS / 2];  // [64 columns, EXPERTS]
  multiply_router<T, 3 / T::kTerms>(s, d, {x, nullptr, hidden, dz.height}, dz, {first_token, first_column}, steps);
  store_partial<EXPERTS>(partials, d, dz.width, hidden, first_column, static_cast<int>(threadIdx.x) / 32);
}

constexpr int kSumThreads = 256;

// Four elements a thread; the runs in order.
__global__ void __launch_bounds__(kSumThreads)
    router_weight_sum_kernel(float* dw, const float* partials, int64_t elements, int runs, int accumulate) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * 4;
  if (at >= elements) return;
  float4 sum = accumulate ? ld_global(reinterpret_cast<const float4*>(dw + at)) : make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int run = 0; run < runs; ++run) {
    const float4 part = ld_global_readonly(reinterpret_cast<const float4*>(partials + run * elements + at));
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  st_global(reinterpret_cast<float4*>(dw + at), sum);
}

}  // namespace

#define REQUIRE_ROUTER_SIZES(launcher)                                                                    \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= kRouterMaxTokens, ROUTEGRAD_OUT_OF_RANGE);           \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kRouterMaxExperts, ROUTEGRAD_OUT_OF_RANGE);       \
  REQUIRE(launcher, hidden, 1 <= hidden && hidden <= kRouterMaxHidden, ROUTEGRAD_OUT_OF_RANGE);           \
  REQUIRE_MULTIPLE_OF_8(launcher, hidden)

routegrad_status router_backward_workspace(uint64_t* floats, int64_t tokens, int32_t experts, int32_t hidden) {
  REQUIRE(router_backward_workspace, floats, floats != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_ROUTER_SIZES(router_backward_workspace);
  *floats = static_cast<uint64_t>(cut_tokens(tokens, experts, hidden).count) * static_cast<uint64_t>(experts) *
            static_cast<uint64_t>(hidden);
  return ROUTEGRAD_OK;
}

routegrad_status router_backward(void* dx, float* dz, float* dw_partials, const float* scores, const float* log_sum_exp,
                                 const float* dscores, const float* dmean, const float* dlse2, const void* x,
                                 const float* w, int64_t tokens, int32_t experts, int32_t hidden, int32_t score,
                                 int32_t accumulate, routegrad_stream stream) {
  REQUIRE_POINTER(router_backward, dx);
  REQUIRE_POINTER(router_backward, dz);
  REQUIRE_POINTER(router_backward, dw_partials);
  REQUIRE_POINTER(router_backward, scores);
  if (dlse2) REQUIRE_POINTER(router_backward, log_sum_exp);
  if (dscores) REQUIRE_POINTER(router_backward, dscores);
  if (dmean) REQUIRE_POINTER(router_backward, dmean);
  REQUIRE_POINTER(router_backward, x);
  REQUIRE_POINTER(router_backward, w);
  REQUIRE_ROUTER_SIZES(router_backward);
  REQUIRE(router_backward, score, ROUTEGRAD_SCORE_LOGITS <= score && score <= ROUTEGRAD_SCORE_RELU,
          ROUTEGRAD_OUT_OF_RANGE);
  // The others do not leave softmax(z) behind.
  REQUIRE(router_backward, dlse2, !dlse2 || score == ROUTEGRAD_SCORE_LOGITS || score == ROUTEGRAD_SCORE_SOFTMAX,
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(router_backward, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  TensorMap dx_map, x_map;
  routegrad_status status = router_map(&dx_map, dx, tokens, hidden);
  if (status == ROUTEGRAD_OK) status = router_map(&x_map, x, tokens, hidden);
  if (status != ROUTEGRAD_OK) return status;
  const auto height = static_cast<int>(tokens);
  const RouterBackward backward{dz,    scores, log_sum_exp, dscores, dmean, dlse2, {w, experts, hidden}, height,
                                experts, score, accumulate};
  const TokenRuns runs = cut_tokens(tokens, experts, hidden);
  const auto blocks = static_cast<uint32_t>((tokens + kRouterTokens - 1) / kRouterTokens);
  return with_padded_experts(experts, [&](auto padded) {
    constexpr int kExperts = padded;
    if constexpr (kForAmpere) {
      using WeightStages = RouterMmaStages<WeightMmaTiles<kExperts>>;
      static_assert(shared_bytes<InputMmaShared<kExperts>> <= 99 * 1024 && shared_bytes<WeightStages> <= 99 * 1024);
      if (!on_hopper()) {
        const routegrad_status first =
            launch(router_input_gradient_mma_kernel<kExperts>,
                   {dim3(blocks), kRouterMmaThreads, shared_bytes<InputMmaShared<kExperts>>}, stream,
                   Bf16Output{{}, static_cast<bf16*>(dx), hidden, 1}, backward);
        if (first != ROUTEGRAD_OK) return first;
        return launch(router_weight_partials_mma_kernel<kExperts>,
                      {dim3(static_cast<uint32_t>(runs.columns), static_cast<uint32_t>(runs.count)), kRouterMmaThreads,
                       shared_bytes<WeightStages>},
                      stream, dw_partials, static_cast<const bf16*>(x), F32Matrix{dz, height, experts}, hidden, runs.tiles);
      }
    }
    constexpr size_t kInputBytes = shared_bytes<InputShared<kExperts>>;
    constexpr size_t kWeightBytes = shared_bytes<RouterStages<WeightTiles<kExperts>>>;
    static_assert(kInputBytes <= 227 * 1024 / InputTiles<kExperts>::kBlocksPerSm - 1024);
    static_assert(kWeightBytes <= 227 * 1024 / WeightTiles<kExperts>::kBlocksPerSm - 1024);
    const routegrad_status first = launch(router_input_gradient_kernel<kExperts>,
                                          {dim3(blocks), kRouterThreads, kInputBytes}, stream, dx_map, backward);
    if (first != ROUTEGRAD_OK) return first;
    return launch(router_weight_partials_kernel<kExperts>,
                  {dim3(static_cast<uint32_t>(runs.columns), static_cast<uint32_t>(runs.count)), kRouterThreads,
                   kWeightBytes},
                  stream, dw_partials, x_map, F32Matrix{dz, height, experts}, hidden, runs.tiles);
  });
}

routegrad_status router_weight_gradient(float* dw, const float* dw_partials, int64_t tokens, int32_t experts,
                                        int32_t hidden, int32_t accumulate, routegrad_stream stream) {
  REQUIRE_POINTER(router_weight_gradient, dw);
  REQUIRE_POINTER(router_weight_gradient, dw_partials);
  REQUIRE_ROUTER_SIZES(router_weight_gradient);
  REQUIRE(router_weight_gradient, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  const int64_t elements = static_cast<int64_t>(experts) * hidden, blocks = (elements / 4 + kSumThreads - 1) / kSumThreads;
  return launch(router_weight_sum_kernel, {dim3(static_cast<uint32_t>(blocks)), kSumThreads}, stream, dw, dw_partials,
                elements, cut_tokens(tokens, experts, hidden).count, accumulate);
}

}  // namespace ROUTEGRAD_VARIANT
