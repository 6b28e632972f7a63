// gate_gradient: the gradient of every gate, with g = dy (Default MoE: the gradient of eq. 11).
//   default_dots    dgates[t, i]  = ⟨g[t, :], ê[i, :]⟩ of every gate
//                   g_rows[r, :]  = g[t, :] for each row r of token t, unless g_rows is null
//   gate_gradient   dgates[t, i]  = Σ_c dots[r, c], c ascending, where token t has a row r of expert i
//                                 = 0 where it has none, or what it was with `keep`
// So with default vectors the first runs before grouped_swiglu_backward, which reads g_rows and writes dots, and the second
// after it, with `keep`: g is read once for both. Without them g is sorted by embedding_forward.
// dots [R, C] f32: partial sums of ⟨g, e_i(x)⟩ that grouped_swiglu_backward wrote. g [T, D], g_rows [R, D] bf16, ê [E, D] f32,
// dgates [T, E] f32, assigned. slot_row, choices [T, slots]: common/slots.cuh. D a multiple of 8, 1 <= E <= 256,
// T · slots < 2^31, ê finite. Rows that no slot names are neither read nor written.
//
// Deterministic: one thread per element, k-tiles and c in order.
//
// default_dots: g · êᵀ on tensor cores, 128 tokens by N = 16, 32 or 64 experts a block, D in k-tiles of 64 through a ring of
// four stages. A producer warp loads g (bf16) and ê (f32) by TMA; two consumer warpgroups split ê into two bf16 terms,
// high + low, in shared memory, and multiply both with g, which is exact: the error is 2^-16 of Σ |g ê| and that of f32
// sums. While the tensor cores multiply, the warpgroups of the blocks of the first experts copy the k-tile of g, as it lies
// in shared memory, to its rows.
//
// Bytes: default_dots 2·T·D + 4·E·D + 4·T·E, with g_rows 2·S·D + 4·slots·T more, S the slots with a row. (Every 64 experts
// read g again and every 128 tokens ê, from cache; so are the rows of the slots of a token from the ninth on, every k-tile.)
// gate_gradient 4·S·C + 4·slots·T, 4·slots·T more with choices (each gate looks its expert up in them, from cache), and
// 4·T·E, or 4·S with `keep`.
// FLOPs: default_dots 4·T·E'·D, E' = E rounded up to 16, 32 or a multiple of 64, T to 128, D to 64; gate_gradient none.
// Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/gemm_load.cuh"
#include "common/mma_fragment.cuh"
#include "common/ptx.cuh"
#include "common/slots.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kMaxExperts = 256;

// ---- gates of experts with a row: a thread per gate
constexpr int kGateThreads = 256;

struct GateGradient {
  float* dgates;
  const float* dots;
  TokenSlots slots;
  int64_t tokens;
  int dot_columns;
  bool keep;

  // The token's row of the expert, −1 for none.
  DEV int row(int64_t token, int expert) const {
    if (!slots.choices) return slots.row(token, expert);
    for (int slot = 0; slot < slots.width; ++slot)
      if (slots.expert(token, slot) == expert) return slots.row(token, slot);
    return -1;
  }

  DEV float sum_of_dots(int row) const {
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

__global__ void __launch_bounds__(kGateThreads) gate_gradient_kernel(const __grid_constant__ GateGradient p) {
  const int64_t i = int64_t{blockIdx.x} * kGateThreads + threadIdx.x, token = i / p.slots.experts;
  if (token >= p.tokens) return;
  const int row = p.row(token, static_cast<int>(i - token * p.slots.experts));
  if (row >= 0 || !p.keep) st_global(p.dgates + i, row >= 0 ? p.sum_of_dots(row) : 0);
}

// ---- dots with default vectors, and g's rows
constexpr int kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kTokens = 128, kDepth = 64, kStages = 4;
constexpr int kSplits = 3;  // a warpgroup fills one while the other may still multiply from the two before
constexpr int kListed = 8;  // slots of a token whose rows are looked up once

struct DefaultDots {
  float* dgates;
  bf16* g_rows;
  TokenSlots slots;
  int64_t tokens;
  int hidden;
};

// The rows that g's tiles go to. Only the blocks of the first experts have any.
struct RowList {
  int32_t row[kTokens][kListed];  // of a token's first slots, −1 for none

  DEV void fill(const DefaultDots& p, int first_token) {
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * kListed; i += kConsumers) {
      const int token = i / kListed, slot = i % kListed;
      row[token][slot] = row_of(p, first_token + token, slot);
    }
  }

  // Stores columns k … k + 63 of the tokens: eight threads a token, 16 bytes each.
  DEV void copy(const DefaultDots& p, const bf16 (&g)[kTokens * kDepth], int first_token, int k) const {
    const int chunk = threadIdx.x % 8, column = k + 8 * chunk;
    if (column >= p.hidden) return;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / kConsumers; ++i) {
      const int token = static_cast<int>(threadIdx.x) / 8 + i * kConsumers / 8;
      const uint4 piece = *reinterpret_cast<const uint4*>(g + token * kDepth + (chunk ^ (token & 7)) * 8);
#pragma unroll 1
      for (int slot = 0; slot < p.slots.width; ++slot) {
        const int to = slot < kListed ? row[token][slot] : row_of(p, first_token + token, slot);
        if (to >= 0) st_global(reinterpret_cast<uint4*>(p.g_rows + int64_t{to} * p.hidden + column), piece);
      }
    }
  }

 private:
  DEV static int row_of(const DefaultDots& p, int64_t token, int slot) {
    return token < p.tokens && slot < p.slots.width ? p.slots.row(token, slot) : -1;
  }
};

template <int N>
struct alignas(1024) Tiles {
  bf16 g[kStages][kTokens * kDepth];
  bf16 split[kSplits][2][N * kDepth];  // high and low terms of ê
  float vectors[kStages][N * kDepth];
  RowList rows;
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
    const float4 first = *reinterpret_cast<const float4*>(vectors + 8 * i);
    const float4 second = *reinterpret_cast<const float4*>(vectors + 8 * i + 4);
    const float v[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
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
DEV void consume(Tiles<N>& s, float (&d)[N / 2], const DefaultDots& p, int steps, int first_token, bool sorts) {
  const int warpgroup = threadIdx.x / 128;
  if (sorts) s.rows.fill(p, first_token);
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
    // The k-tile before is multiplied, and was copied before the barrier: its stage may be loaded again.
    wgmma_wait<1>();
    if (step > 0 && threadIdx.x % 32 == 0) mbar_arrive(&s.empty[(step - 1) % kStages]);
    if (sorts) s.rows.copy(p, s.g[stage], first_token, step * kDepth);
  }
  wgmma_wait<0>(d);
}

// The gates of the block's tokens and N experts, from d of the thread's 64 tokens.
template <int N>
DEV void store_dots(const DefaultDots& p, const float (&d)[N / 2], int first_token, int first_expert) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t token = first_token + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int expert = first_expert + i / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
      if (token < p.tokens && expert < p.slots.experts)
        st_global(p.dgates + token * p.slots.experts + expert, d[i / 2 * 4 + 2 * h + i % 2]);
    }
  }
}

// Grid (tiles of tokens, tiles of experts).
template <int N>
__global__ void __launch_bounds__(kThreads)
    default_dots_kernel(const __grid_constant__ TensorMap map_g, const __grid_constant__ TensorMap map_vectors,
                        const __grid_constant__ DefaultDots p) {
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
  consume<N>(s, d, p, steps, first_token, p.g_rows && blockIdx.y == 0);
  store_dots<N>(p, d, first_token, first_expert);
}

// ---- the same without wgmma: two warpgroups, which load k-tiles one ahead, split ê, and multiply
template <int N>
struct alignas(1024) MmaTiles {
  bf16 g[2][kTokens * kDepth];
  bf16 split[2][N * kDepth];  // high and low terms of ê
  float vectors[2][N * kDepth];
  RowList rows;
};
struct TokenRows {  // g, as copy_boxes reads it
  const bf16* data;
  const int32_t* row_index;
  int width;
};

template <int N>
DEV void load_tiles(MmaTiles<N>& s, const TokenRows& g, const float* vectors, const DefaultDots& p, int first_token,
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
__global__ void __launch_bounds__(kConsumers, 1)
    default_dots_mma(const bf16* g, const float* vectors, const __grid_constant__ DefaultDots p) {
  if constexpr (!kCompilesAmpere) return;
  DYNAMIC_SHARED(MmaTiles<N>, s);
  const int steps = (p.hidden + kDepth - 1) / kDepth, warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
  const int first_token = static_cast<int>(blockIdx.x) * kTokens, first_expert = static_cast<int>(blockIdx.y) * N;
  const TokenRows rows{g, nullptr, p.hidden};
  const bool sorts = p.g_rows && blockIdx.y == 0;
  if (sorts) s.rows.fill(p, first_token);
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
    if (sorts) s.rows.copy(p, s.g[step % 2], first_token, step * kDepth);
  }
  cp_async_wait<0>();
  store_dots<N>(p, d, first_token, first_expert);
}

template <int N>
routegrad_status launch_default_dots(const DefaultDots& p, const void* g, const float* vectors,
                                     routegrad_stream stream) {
  const dim3 grid(static_cast<uint32_t>((p.tokens + kTokens - 1) / kTokens),
                  static_cast<uint32_t>((p.slots.experts + N - 1) / N));
  if constexpr (kForAmpere) {
    static_assert(shared_bytes<MmaTiles<N>> <= 99 * 1024);
    if (!on_hopper())
      return launch(default_dots_mma<N>, {grid, kConsumers, shared_bytes<MmaTiles<N>>}, stream,
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
  return launch(default_dots_kernel<N>, {grid, kThreads, shared_bytes<Tiles<N>>}, stream, map_g, map_vectors, p);
}

}  // namespace

#define REQUIRE_GATES(launcher)                                                                         \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= INT32_MAX - kTokens, ROUTEGRAD_OUT_OF_RANGE);      \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);                      \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);           \
  REQUIRE(launcher, slots, 1 <= slots && slots <= experts, ROUTEGRAD_OUT_OF_RANGE);                     \
  REQUIRE(launcher, tokens, tokens <= INT32_MAX / slots, ROUTEGRAD_OVERFLOW)

routegrad_status default_dots(float* dgates, void* g_rows, const void* g, const float* vectors, const int32_t* slot_row,
                              int64_t tokens, int64_t rows, int32_t experts, int32_t hidden, int32_t slots,
                              routegrad_stream stream) {
  REQUIRE_POINTER(default_dots, dgates);
  REQUIRE_POINTER(default_dots, g);
  REQUIRE_POINTER(default_dots, vectors);
  if (slot_row) REQUIRE_POINTER(default_dots, g_rows);
  if (g_rows) REQUIRE_POINTER(default_dots, slot_row);
  REQUIRE_GATES(default_dots);
  REQUIRE(default_dots, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(default_dots, hidden);
  const DefaultDots p{dgates, static_cast<bf16*>(g_rows), {slot_row, nullptr, slots, experts, static_cast<uint32_t>(rows)},
                      tokens, hidden};
  if (experts <= 16) return launch_default_dots<16>(p, g, vectors, stream);
  if (experts <= 32) return launch_default_dots<32>(p, g, vectors, stream);
  return launch_default_dots<64>(p, g, vectors, stream);
}

routegrad_status gate_gradient(float* dgates, const float* dots, const int32_t* slot_row, const int32_t* choices,
                               int64_t tokens, int64_t rows, int32_t experts, int32_t slots, int32_t dot_columns,
                               int32_t keep, routegrad_stream stream) {
  REQUIRE_POINTER(gate_gradient, dgates);
  REQUIRE_POINTER(gate_gradient, dots);
  REQUIRE_POINTER(gate_gradient, slot_row);
  if (choices) REQUIRE_POINTER(gate_gradient, choices);
  REQUIRE_GATES(gate_gradient);
  REQUIRE(gate_gradient, slots, choices || slots == experts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, dot_columns, 1 <= dot_columns && dot_columns <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(gate_gradient, keep, keep == 0 || keep == 1, ROUTEGRAD_OUT_OF_RANGE);
  const int64_t blocks = (tokens * experts + kGateThreads - 1) / kGateThreads;
  REQUIRE(gate_gradient, tokens, blocks <= INT32_MAX, ROUTEGRAD_OVERFLOW);
  const GateGradient p{dgates, dots,  {slot_row, choices, slots, experts, static_cast<uint32_t>(rows)},
                       tokens, dot_columns, keep != 0};
  return launch(gate_gradient_kernel, {dim3(static_cast<uint32_t>(blocks)), kGateThreads}, stream, p);
}

}  // namespace ROUTEGRAD_VARIANT
