// gate_gradient: the gradient of every gate, with g = dy (Default MoE: the gradient of eq. 11).
//   dgates[t, i] = Σ_c dots[r, c], c ascending    where token t has a row r of expert i
//                = ⟨g[t, :], ê[i, :]⟩             where it has none; 0 when vectors is null
// dots [R, C] f32: partial sums of ⟨g, e_i(x)⟩ that grouped_swiglu_backward wrote. g [T, D] bf16 and vectors, ê [E, D]
// f32, are read only for the second line. slot_row, choices [T, slots]: common/slots.cuh. dgates [T, E] f32, assigned.
// D a multiple of 8, 1 <= E <= 256, T · slots < 2^31, ê finite. Rows of dots that no slot names are not read.
//
// Deterministic: one thread per element, k-tiles and c in order.
//
// With vectors: g · êᵀ on tensor cores, 128 tokens by N = 16, 32 or 64 experts a block, D in k-tiles of 64 through a ring
// of four stages. A producer warp loads g (bf16) and ê (f32) by TMA; two consumer warpgroups split ê into two bf16 terms,
// high + low, in shared memory, and multiply both with g, which is exact: the error is 2^-16 of Σ |g ê| and that of f32
// sums.
//
// Bytes: 4·T·E + 4·slots·T + 4·S·C, S the slots with a row, and 4·slots·T with choices (without vectors each gate looks
// its expert up in them, from cache); with vectors 2·T·D + 4·E·D. (Every 64 experts read g again and every 128 tokens ê,
// from cache.)
// FLOPs: 4·T·E'·D with vectors, E' = E rounded up to 16, 32 or a multiple of 64, T to 128, D to 64; else none.
// Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/gemm_load.cuh"
#include "common/mma_fragment.cuh"
#include "common/ptx.cuh"
#include "common/slots.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kMaxExperts = 256;

struct GateGradient {
  float* dgates;
  const float* dots;
  TokenSlots slots;
  int64_t tokens;
  int hidden, dot_columns;

  // Where the token has a row of the expert: the sum of its partial dots.
  DEV float chosen_dot(int64_t token, int expert) const {
    int row = -1;
    for (int slot = slots.choices ? 0 : expert; row < 0 && slot < slots.width; ++slot) {
      if (slots.expert(token, slot) == expert) row = slots.row(token, slot);
      if (!slots.choices) break;
    }
    if (row < 0) return 0;
    const float* const from = dots + int64_t{row} * dot_columns;
    float sum = 0;
    constexpr int kAhead = 8;  // loads under way together
    for (int c = 0; c < dot_columns; c += kAhead) {
      float next[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) next[i] = c + i < dot_columns ? ld_global_readonly(from + c + i) : 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum += next[i];
    }
    return sum;
  }
};

// ---- without vectors: a thread per gate.
constexpr int kGateThreads = 256;

__global__ void __launch_bounds__(kGateThreads) gate_gradient_chosen(const __grid_constant__ GateGradient p) {
  const int64_t i = int64_t{blockIdx.x} * kGateThreads + threadIdx.x, token = i / p.slots.experts;
  if (token < p.tokens) st_global(p.dgates + i, p.chosen_dot(token, static_cast<int>(i - token * p.slots.experts)));
}

// ---- with vectors
constexpr int kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kTokens = 128, kDepth = 64, kStages = 4;
constexpr int kSplits = 3;  // a warpgroup fills one while the other may still multiply from the two before

template <int N>
struct alignas(1024) Tiles {
  bf16 g[kStages][kTokens * kDepth];
  bf16 split[kSplits][2][N * kDepth];  // high and low terms of ê
  float vectors[kStages][N * kDepth];
  uint64_t full[kStages], empty[kStages];
};

template <int N>
DEV void produce(Tiles<N>& s, const TensorMap* map_g, const TensorMap* map_vectors, int steps, int token, int expert) {
  tma_prefetch(map_g);
  tma_prefetch(map_vectors);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    mbar_wait(&s.empty[stage], (step / kStages & 1) ^ 1);
    mbar_expect_tx(&s.full[stage], sizeof s.g[stage] + sizeof s.vectors[stage]);
    tma_load_2d(s.g[stage], map_g, &s.full[stage], step * kDepth, token);
    tma_load_2d(s.vectors[stage], map_vectors, &s.full[stage], step * kDepth, expert);
  }
}

// high + low = ê to 16 bits; 8 columns a time, laid out for the tensor cores: chunks of 16 bytes XORed by the row.
template <int N>
DEV void split_vectors(bf16 (&split)[2][N * kDepth], const float (&vectors)[N * kDepth]) {
  for (int i = static_cast<int>(threadIdx.x); i < N * kDepth / 8; i += kConsumers) {
    const int expert = i / 8, chunk = i % 8;
    const float* const v = vectors + 8 * i;
    uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      high[j] = pack_bf16(v[2 * j], v[2 * j + 1]);
      low[j] = pack_bf16(v[2 * j] - low_bf16(high[j]), v[2 * j + 1] - high_bf16(high[j]));
    }
    const int at = expert * kDepth + (chunk ^ (expert & 7)) * 8;
    *reinterpret_cast<uint4*>(split[0] + at) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(split[1] + at) = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

// d = g · êᵀ of 64 tokens and N experts.
template <int N>
DEV void consume(Tiles<N>& s, float (&d)[N / 2], int steps) {
  const int warpgroup = threadIdx.x / 128;
  pin_registers(d);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, buffer = step % kSplits;
    mbar_wait(&s.full[stage], step / kStages & 1);
    split_vectors<N>(s.split[buffer], s.vectors[stage]);
    fence_proxy_async();
    named_bar_sync(1, kConsumers);
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kDepth / 16; ++k16) {
      const uint64_t a = wgmma_descriptor<Major::K>(s.g[stage] + warpgroup * 64 * kDepth, k16, 64, kDepth);
      wgmma<N>(d, a, wgmma_descriptor<Major::K>(s.split[buffer][0], k16, N, kDepth), step > 0 || k16 > 0);
      wgmma<N>(d, a, wgmma_descriptor<Major::K>(s.split[buffer][1], k16, N, kDepth), true);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the k-tile before is done: its stage may be loaded again
    if (step > 0 && threadIdx.x % 32 == 0) mbar_arrive(&s.empty[(step - 1) % kStages]);
  }
  wgmma_wait<0>(d);
}

// The gates of the block's tokens and N experts, from d of the thread's 64 tokens.
template <int N>
DEV void store_gates(const GateGradient& p, const float (&d)[N / 2], int first_token, int first_expert) {
  const auto column = [](int i) { return i / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2; };  // of value i
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t token = first_token + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
    const bool there = token < p.tokens;
    const uint64_t chosen = p.slots.chosen(token, there, first_expert);
    const auto is_mine = [&](int n) { return there && first_expert + n < p.slots.experts; };
    float* const to = p.dgates + token * p.slots.experts + first_expert;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int n = column(i);
      if (is_mine(n) && !(chosen >> n & 1)) st_global(to + n, d[i / 2 * 4 + 2 * h + i % 2]);
    }
    for (int i = 0; i < N / 4; ++i) {
      const int n = column(i);
      if (is_mine(n) && chosen >> n & 1) st_global(to + n, p.chosen_dot(token, first_expert + n));
    }
  }
}

// Grid (tiles of tokens, tiles of experts).
template <int N>
__global__ void __launch_bounds__(kThreads)
    gate_gradient_vectors(const __grid_constant__ TensorMap map_g, const __grid_constant__ TensorMap map_vectors,
                          const __grid_constant__ GateGradient p) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(Tiles<N>, s);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbar_init(&s.full[stage], 1);
      mbar_init(&s.empty[stage], kConsumers / 32);
    }
    fence_mbar_init();
  }
  __syncthreads();
  const int steps = (p.hidden + kDepth - 1) / kDepth;
  const int first_token = static_cast<int>(blockIdx.x) * kTokens, first_expert = static_cast<int>(blockIdx.y) * N;
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce<N>(s, &map_g, &map_vectors, steps, first_token, first_expert);
    return;
  }
  float d[N / 2];
  consume<N>(s, d, steps);
  store_gates<N>(p, d, first_token, first_expert);
}

// ---- the same without wgmma: two warpgroups, which load k-tiles one ahead, split ê, and multiply
template <int N>
struct alignas(1024) MmaTiles {
  bf16 g[2][kTokens * kDepth];
  bf16 split[2][N * kDepth];  // high and low terms of ê
  float vectors[2][N * kDepth];
};
struct TokenRows {  // g, as copy_boxes reads it
  const bf16* data;
  const int32_t* row_index;
  int width;
};

template <int N>
DEV void load_tiles(MmaTiles<N>& s, const TokenRows& g, const float* vectors, const GateGradient& p, int first_token,
                    int first_expert, int step) {
  const int warpgroup = threadIdx.x / 128, k = step * kDepth, buffer = step % 2;
  copy_boxes<Major::K>(s.g[buffer] + warpgroup * kBoxElements, g, 1, first_token + 64 * warpgroup,
                       static_cast<int>(p.tokens), k, p.hidden);
  for (int i = static_cast<int>(threadIdx.x); i < N * kDepth / 4; i += kConsumers) {
    const int expert = first_expert + i / (kDepth / 4), column = k + i % (kDepth / 4) * 4;
    const bool valid = expert < p.slots.experts && column < p.hidden;
    cp_async_16(s.vectors[buffer] + 4 * i, vectors + (valid ? int64_t{expert} * p.hidden + column : 0), valid ? 16 : 0);
  }
}

template <int N>
__global__ void __launch_bounds__(kConsumers)
    gate_gradient_mma(const bf16* g, const float* vectors, const __grid_constant__ GateGradient p) {
  if constexpr (!kCompilesAmpere) return;
  DYNAMIC_SHARED(MmaTiles<N>, s);
  const int steps = (p.hidden + kDepth - 1) / kDepth, warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
  const int first_token = static_cast<int>(blockIdx.x) * kTokens, first_expert = static_cast<int>(blockIdx.y) * N;
  const TokenRows rows{g, nullptr, p.hidden};
  float d[N / 2] = {};
  load_tiles<N>(s, rows, vectors, p, first_token, first_expert, 0);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // the k-tile is there, the one before is read
    split_vectors<N>(s.split, s.vectors[step % 2]);
    if (step + 1 < steps) load_tiles<N>(s, rows, vectors, p, first_token, first_expert, step + 1);
    cp_async_commit();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[1][4], b[N / 16][4];
      load_fragment_a<Major::K>(a, s.g[step % 2] + warpgroup * kBoxElements, 64, 16 * warp, k);
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        load_fragments_b<Major::K>(b, s.split[term], N, 0, k);
        mma_row(d, a[0], b);
      }
    }
  }
  cp_async_wait<0>();
  store_gates<N>(p, d, first_token, first_expert);
}

template <int N>
routegrad_status launch_with_vectors(const GateGradient& p, const void* g, const float* vectors,
                                     routegrad_stream stream) {
  const dim3 grid(static_cast<uint32_t>((p.tokens + kTokens - 1) / kTokens),
                  static_cast<uint32_t>((p.slots.experts + N - 1) / N));
  if constexpr (kForAmpere) {
    static_assert(shared_bytes<MmaTiles<N>> <= 99 * 1024);
    if (!on_hopper())
      return launch(gate_gradient_mma<N>, {grid, kConsumers, shared_bytes<MmaTiles<N>>}, stream,
                    static_cast<const bf16*>(g), vectors, p);
  }
  TensorMap map_g, map_vectors;
  const auto hidden = static_cast<uint64_t>(p.hidden), tokens = static_cast<uint64_t>(p.tokens);
  const auto experts = static_cast<uint64_t>(p.slots.experts);
  routegrad_status status = make_tensor_map<2>(
      &map_g, {g, Element::Bf16, {hidden, tokens}, {hidden * 2}, {kDepth, kTokens}, Swizzle::Span128});
  if (status == ROUTEGRAD_OK)
    status = make_tensor_map<2>(&map_vectors,
                                {vectors, Element::F32, {hidden, experts}, {hidden * 4}, {kDepth, N}, Swizzle::None});
  if (status != ROUTEGRAD_OK) return status;
  return launch(gate_gradient_vectors<N>, {grid, kThreads, shared_bytes<Tiles<N>>}, stream, map_g, map_vectors, p);
}

}  // namespace

routegrad_status gate_gradient(float* dgates, const float* dots, const void* g, const float* vectors,
                               const int32_t* slot_row, const int32_t* choices, int64_t tokens, int64_t rows,
                               int32_t experts, int32_t hidden, int32_t slots, int32_t dot_columns,
                               routegrad_stream stream) {
  REQUIRE_POINTER(gate_gradient, dgates);
  REQUIRE_POINTER(gate_gradient, dots);
  if (vectors) {
    REQUIRE_POINTER(gate_gradient, g);
    REQUIRE_POINTER(gate_gradient, vectors);
  }
  REQUIRE_POINTER(gate_gradient, slot_row);
  if (choices) REQUIRE_POINTER(gate_gradient, choices);
  REQUIRE(gate_gradient, tokens, 1 <= tokens && tokens <= INT32_MAX - kTokens, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(gate_gradient, hidden);
  REQUIRE(gate_gradient, slots, 1 <= slots && slots <= experts && (choices || slots == experts), ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, dot_columns, 1 <= dot_columns && dot_columns <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, tokens, tokens <= INT32_MAX / slots, ROUTEGRAD_OVERFLOW);
  const GateGradient p{dgates, dots, {slot_row, choices, slots, experts, static_cast<uint32_t>(rows)},
                       tokens, hidden, dot_columns};
  if (vectors) {
    if (experts <= 16) return launch_with_vectors<16>(p, g, vectors, stream);
    if (experts <= 32) return launch_with_vectors<32>(p, g, vectors, stream);
    return launch_with_vectors<64>(p, g, vectors, stream);
  }
  const int64_t blocks = (tokens * experts + kGateThreads - 1) / kGateThreads;
  REQUIRE(gate_gradient, tokens, blocks <= INT32_MAX, ROUTEGRAD_OVERFLOW);
  return launch(gate_gradient_chosen, {dim3(static_cast<uint32_t>(blocks)), kGateThreads}, stream, p);
}

}  // namespace ROUTEGRAD_VARIANT
