// combine: the layer's output from its experts' rows and the default vectors (Default MoE, eq. 11).
//   y[t, :] = or += Σ_{slots s of t with a row} gate[t, e(s)] · rows_in[row(s), :]
//                 + Σ_{experts i without a row of t} gate[t, i] · ê[i, :]
// gates [T, E] f32, or null: every gate is 1 (the gradient of x from the gradients of its rows). vectors: ê [E, D] f32, or
// null: no second sum. slot_row, choices [T, slots]: common/slots.cuh. rows_in [R, D] and y [T, D] are bf16; D a multiple
// of 8, 1 <= E <= 256, T · slots < 2^31, ê finite. y is assigned or, with `accumulate`, added to.
// Rows that no slot names are not read.
//
// Sums in f32, rounded once. Deterministic: one thread per element; first the products with ê, then slots in ascending
// order, then the old y.
//
// Without vectors a warp takes 1024 columns of a token, 16 bytes a lane and load. With vectors a warpgroup takes 64 tokens
// and multiplies them with 128 columns of ê on tensor cores: gates as A in registers, with zeros for the chosen experts,
// and ê as B in shared memory, where each block holds its slice of ê for all its tokens. Both are split into two bf16
// terms, high + low; three of the four products are taken, so the error is 3·2^-16 of Σ |gate ê| at most, a fiftieth of
// what rounding to bf16 may be. B's columns are permuted so that a thread's accumulators are runs of 8 columns: rows are
// added to them straight from global memory.
//
// Bytes: 2·D·(S + T) + 4·slots·T, S the slots with a row; 4·(slots + S) with choices or gates; with vectors 4·E·(T + D);
// 2·D·T to accumulate. (What is per token and expert is read again, from cache, for every slice of 512, 256 or 128 columns.)
// FLOPs: 6·T·E'·D with vectors, E' = E rounded up to 16, 32, 64, 128 or 256, T to 64, D to 128; else none.
// Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/bf16_terms.cuh"
#include "common/mma_fragment.cuh"
#include "common/ptx.cuh"
#include "common/slots.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kMaxExperts = 256;

struct Combine {
  bf16* y;
  const bf16* rows_in;
  const float* gates;
  const float* vectors;
  TokenSlots slots;
  int64_t tokens;
  int hidden;
  bool accumulate;

  DEV float gate(int64_t token, int expert) const {
    return gates ? ld_global_readonly(gates + token * slots.experts + expert) : 1;
  }
};

// 8 columns: sum += weight · row.
DEV void add_scaled(float (&sum)[8], uint4 row, float weight) {
  const uint32_t pairs[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += weight * low_bf16(pairs[i]);
    sum[2 * i + 1] += weight * high_bf16(pairs[i]);
  }
}
// Adds what is there when asked, and stores.
DEV void finish(bf16* at, float (&sum)[8], bool accumulate) {
  uint4* const to = reinterpret_cast<uint4*>(at);
  if (accumulate) add_scaled(sum, ld_global(to), 1);
  st_global(to, make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                           pack_bf16(sum[6], sum[7])));
}

// ---- without vectors
constexpr int kRowThreads = 256, kChunks = 4, kSegment = 32 * 8 * kChunks;  // columns of a warp

__global__ void __launch_bounds__(kRowThreads) combine_rows(const __grid_constant__ Combine p, int segments) {
  const int lane = threadIdx.x % 32;
  const int64_t item = int64_t{blockIdx.x} * (kRowThreads / 32) + threadIdx.x / 32, token = item / segments;
  if (token >= p.tokens) return;
  const int column = static_cast<int>(item - token * segments) * kSegment + 8 * lane;
  float sum[kChunks][8] = {};
  for (int first = 0; first < p.slots.width; first += 32) {
    const int slot = first + lane, row = slot < p.slots.width ? p.slots.row(token, slot) : -1;
    const float gate = row >= 0 && p.gates ? p.gate(token, p.slots.expert(token, slot)) : 1;
    for (uint32_t left = __ballot_sync(~0u, row >= 0); left; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const bf16* const from = p.rows_in + int64_t{__shfl_sync(~0u, row, source)} * p.hidden + column;
      uint4 chunk[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        chunk[i] = column + 256 * i < p.hidden ? ld_global_readonly(reinterpret_cast<const uint4*>(from + 256 * i))
                                               : make_uint4(0, 0, 0, 0);
      const float weight = __shfl_sync(~0u, gate, source);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) add_scaled(sum[i], chunk[i], weight);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (column + 256 * i < p.hidden) finish(p.y + token * p.hidden + column + 256 * i, sum[i], p.accumulate);
}

// ---- with vectors
constexpr int kTokens = 64;  // of one product

// STEPS products of 16 experts are held in registers, CHUNKS of those make up all experts.
template <int STEPS, int CHUNKS>
struct ExpertCount {
  static constexpr int kSteps = STEPS, kChunks = CHUNKS, kCount = 16 * STEPS * CHUNKS;
};
// Columns of ê that a block holds: 32 or 64 KB of shared memory, 128 KB for 256 experts.
constexpr int slice_of(int experts) { return experts <= 32 ? 512 : experts <= 64 ? 256 : 128; }
template <int STEPS, int CHUNKS>
struct Experts : ExpertCount<STEPS, CHUNKS> {
  static constexpr int kSlice = slice_of(16 * STEPS * CHUNKS);
  static constexpr int kColumns = 128;                                 // of one product
  static constexpr int kWarpgroups = 3, kThreads = 128 * kWarpgroups;  // 168 registers a thread
};
// Without wgmma: 64 KB of shared memory at most, and more registers, for B's fragments.
template <int STEPS, int CHUNKS>
struct MmaExperts : ExpertCount<STEPS, CHUNKS> {
  static constexpr bool kMost = 16 * STEPS * CHUNKS == 256;
  static constexpr int kColumns = kMost ? 64 : 128;
  static constexpr int kSlice = kMost ? 64 : slice_of(16 * STEPS * CHUNKS);
  static constexpr int kWarpgroups = 2, kThreads = 128 * kWarpgroups;
};

// ê of one slice, high and low terms: boxes of 64 columns, one 128-byte row per expert, chunks XORed by the row.
template <class N>
struct alignas(1024) SplitVectors {
  uint8_t term[2][N::kSlice / 64][N::kCount * 128];
};

// Fills the slice; zero past the last expert and column. Column c of a run of 32 is column n(c) of the product: thread q
// of a quad then holds c = 8 q … 8 q + 7 in accumulators of n = 8 j + 2 q + e, j < 4, e < 2.
template <class N>
DEV void load_vectors(SplitVectors<N>& s, const Combine& p, int first_column) {
  constexpr int kQuarters = N::kSlice / 4;
  for (int i = static_cast<int>(threadIdx.x); i < N::kCount * kQuarters; i += N::kThreads) {
    const int expert = i / kQuarters, c = i % kQuarters * 4, column = first_column + c;
    float4 v = make_float4(0, 0, 0, 0);
    if (expert < p.slots.experts && column < p.hidden)
      v = ld_global_readonly(reinterpret_cast<const float4*>(p.vectors + int64_t{expert} * p.hidden + column));
    uint32_t high[2], low[2];
    split(high[0], low[0], v.x, v.y);
    split(high[1], low[1], v.z, v.w);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = c / 32 * 32 + c % 8 / 4 * 16 + 8 * half + c % 32 / 8 * 2;
      const int at = expert * 128 + ((n % 64 / 8) ^ (expert & 7)) * 16 + n % 8 * 2;
      *reinterpret_cast<uint32_t*>(&s.term[0][n / 64][at]) = high[half];
      *reinterpret_cast<uint32_t*>(&s.term[1][n / 64][at]) = low[half];
    }
  }
}

// A: the gates of 64 tokens for a chunk of experts, zero where the expert is chosen or there is none.
template <int STEPS>
struct Gates {
  uint32_t high[STEPS][4], low[STEPS][4];

  DEV void load(const Combine& p, const int64_t (&token)[2], int first) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = token[h] < p.tokens;
      const uint64_t chosen = p.slots.chosen(token[h], there, first);
      const auto gate = [&](int i) {
        return there && first + i < p.slots.experts && !(chosen >> i & 1) ? p.gate(token[h], first + i) : 0;
      };
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int kh = 0; kh < 2; ++kh) {
          const int i = 16 * k + 8 * kh + 2 * static_cast<int>(threadIdx.x % 4);
          split(high[k][2 * kh + h], low[k][2 * kh + h], gate(i), gate(i + 1));
        }
    }
  }
};

// Slot 4 b + q of a thread's two tokens, in lane q of the quad.
struct SlotBatch {
  int row[2];
  float gate[2];

  DEV void load(const Combine& p, const int64_t (&token)[2], int first) {
    const int slot = first + static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = token[h] < p.tokens && slot < p.slots.width ? p.slots.row(token[h], slot) : -1;
      gate[h] = row[h] >= 0 ? p.gate(token[h], p.slots.expert(token[h], slot)) : 0;
    }
  }
  // Slot s of the batch, for the whole quad.
  DEV SlotBatch slot(int s) const {
    const int lane = static_cast<int>(threadIdx.x % 32 & ~3u) + s;
    return {{__shfl_sync(~0u, row[0], lane), __shfl_sync(~0u, row[1], lane)},
            {__shfl_sync(~0u, gate[0], lane), __shfl_sync(~0u, gate[1], lane)}};
  }
};

// The 8 columns at column + 32 g of both tokens' rows.
template <class N>
struct RowChunks {
  static constexpr int kColumns = N::kColumns;
  uint4 chunk[2][kColumns / 32];

  DEV void load(const Combine& p, const SlotBatch& slot, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int g = 0; g < kColumns / 32; ++g)
        chunk[h][g] = slot.row[h] >= 0 && column + 32 * g < p.hidden
                          ? ld_global_readonly(reinterpret_cast<const uint4*>(
                                p.rows_in + int64_t{slot.row[h]} * p.hidden + column + 32 * g))
                          : make_uint4(0, 0, 0, 0);
  }
};

template <class N>
DEV void add_rows(float (&d)[N::kColumns / 2], const RowChunks<N>& rows, const SlotBatch& slot) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int g = 0; g < N::kColumns / 32; ++g) {
      const uint32_t pairs[4] = {rows.chunk[h][g].x, rows.chunk[h][g].y, rows.chunk[h][g].z, rows.chunk[h][g].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        d[16 * g + 4 * j + 2 * h] += slot.gate[h] * low_bf16(pairs[j]);
        d[16 * g + 4 * j + 2 * h + 1] += slot.gate[h] * high_bf16(pairs[j]);
      }
    }
}

// d = gates · ê of a product's columns. The gates are loaded chunk by chunk where they do not all fit, else when `fresh`.
template <class N>
DEV void multiply(float (&d)[N::kColumns / 2], Gates<N::kSteps>& gates, const SplitVectors<N>& s, const Combine& p,
                  const int64_t (&token)[2], int product, bool fresh) {
#pragma unroll 1
  for (int chunk = 0; chunk < N::kChunks; ++chunk) {
    if (N::kChunks > 1 || fresh) gates.load(p, token, chunk * N::kSteps * 16);
    wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < N::kSteps; ++k) {
      const int k16 = chunk * N::kSteps + k;
      const uint64_t high = wgmma_descriptor<Major::MN>(s.term[0][2 * product], k16, N::kColumns, N::kCount);
      const uint64_t low = wgmma_descriptor<Major::MN>(s.term[1][2 * product], k16, N::kColumns, N::kCount);
      wgmma_a_registers<N::kColumns, Major::MN>(d, gates.high[k], high, chunk > 0 || k > 0);
      wgmma_a_registers<N::kColumns, Major::MN>(d, gates.low[k], high, true);
      wgmma_a_registers<N::kColumns, Major::MN>(d, gates.high[k], low, true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
  }
}

template <class N>
DEV void multiply_mma(float (&d)[N::kColumns / 2], Gates<N::kSteps>& gates, const SplitVectors<N>& s, const Combine& p,
                      const int64_t (&token)[2], int product, bool fresh) {
#pragma unroll
  for (int i = 0; i < N::kColumns / 2; ++i) d[i] = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < N::kChunks; ++chunk) {
    if (N::kChunks > 1 || fresh) gates.load(p, token, chunk * N::kSteps * 16);
#pragma unroll
    for (int k = 0; k < N::kSteps; ++k) {
      const auto load = [&](uint32_t (&b)[N::kColumns / 16][4], int term) {
        load_fragments_b<Major::MN>(b, reinterpret_cast<const bf16*>(s.term[term][product * N::kColumns / 64]), N::kCount,
                                    0, 16 * (chunk * N::kSteps + k));
      };
      uint32_t b[N::kColumns / 16][4];
      load(b, 0);
      mma_row(d, gates.high[k], b);
      mma_row(d, gates.low[k], b);
      load(b, 1);
      mma_row(d, gates.high[k], b);
    }
  }
}

template <class N, bool MMA>
DEV void combine_tiles(const Combine& p) {
  DYNAMIC_SHARED(SplitVectors<N>, s);
  const int first_column = static_cast<int>(blockIdx.x) * N::kSlice;
  load_vectors(s, p, first_column);
  if constexpr (!MMA) fence_proxy_async();
  __syncthreads();
  const int lane = threadIdx.x % 32, columns = min(N::kSlice, p.hidden - first_column);
  const int64_t step = int64_t{gridDim.y} * N::kWarpgroups * kTokens;
  for (int64_t tile = (int64_t{blockIdx.y} * N::kWarpgroups + threadIdx.x / 128) * kTokens; tile < p.tokens; tile += step) {
    const int64_t first_token = tile + threadIdx.x % 128 / 32 * 16 + lane / 4, token[2] = {first_token, first_token + 8};
    Gates<N::kSteps> gates;
    SlotBatch batch;
    for (int product = 0; product * N::kColumns < columns; ++product) {
      const int column = first_column + product * N::kColumns + lane % 4 * 8;
      if (product == 0 || p.slots.width > 4) batch.load(p, token, 0);
      SlotBatch slot = batch.slot(0);
      RowChunks<N> rows;
      rows.load(p, slot, column);  // under way while the tensor cores work
      float d[N::kColumns / 2];
      if constexpr (MMA)
        multiply_mma<N>(d, gates, s, p, token, product, product == 0);
      else
        multiply<N>(d, gates, s, p, token, product, product == 0);
      for (int i = 0; i < p.slots.width; ++i) {
        if (i > 0) {
          if (i % 4 == 0) batch.load(p, token, i);
          slot = batch.slot(i % 4);
          if (!__any_sync(~0u, slot.row[0] >= 0 || slot.row[1] >= 0)) continue;
          rows.load(p, slot, column);
        }
        add_rows<N>(d, rows, slot);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int g = 0; g < N::kColumns / 32; ++g) {
          float sum[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[i] = d[16 * g + i / 2 * 4 + 2 * h + i % 2];
          if (token[h] < p.tokens && column + 32 * g < p.hidden)
            finish(p.y + token[h] * p.hidden + column + 32 * g, sum, p.accumulate);
        }
    }
  }
}

// Grid (slices of D, blocks that share the tokens).
template <class N>
__global__ void __launch_bounds__(N::kThreads, 1) combine_vectors(const __grid_constant__ Combine p) {
  if constexpr (kCompilesHopper) combine_tiles<N, false>(p);
}
template <class N>
__global__ void __launch_bounds__(N::kThreads, 1) combine_vectors_mma(const __grid_constant__ Combine p) {
  if constexpr (kCompilesAmpere) combine_tiles<N, true>(p);
}

template <class N, bool MMA>
routegrad_status launch_tiles(const Combine& p, routegrad_stream stream) {
  static_assert(N::kSlice % N::kColumns == 0, "slices are whole products");
  const int slices = (p.hidden + N::kSlice - 1) / N::kSlice, processors = multiprocessors();
  const int64_t tiles = (p.tokens + kTokens - 1) / kTokens, wanted = (tiles + N::kWarpgroups - 1) / N::kWarpgroups;
  const int64_t share = processors > slices ? processors / slices : 1;
  const dim3 grid(static_cast<uint32_t>(slices), static_cast<uint32_t>(wanted < share ? wanted : share));
  if constexpr (MMA) {
    static_assert(shared_bytes<SplitVectors<N>> <= 99 * 1024);
    return launch(combine_vectors_mma<N>, {grid, N::kThreads, shared_bytes<SplitVectors<N>>}, stream, p);
  } else {
    return launch(combine_vectors<N>, {grid, N::kThreads, shared_bytes<SplitVectors<N>>}, stream, p);
  }
}

template <int STEPS, int CHUNKS>
routegrad_status launch_with_vectors(const Combine& p, routegrad_stream stream) {
  if constexpr (kForAmpere)
    if (!on_hopper()) return launch_tiles<MmaExperts<STEPS, CHUNKS>, true>(p, stream);
  return launch_tiles<Experts<STEPS, CHUNKS>, false>(p, stream);
}

}  // namespace

routegrad_status combine(void* y, const void* rows_in, const float* gates, const int32_t* slot_row,
                         const int32_t* choices, const float* vectors, int64_t tokens, int64_t rows, int32_t experts,
                         int32_t hidden, int32_t slots, int32_t accumulate, routegrad_stream stream) {
  REQUIRE_POINTER(combine, y);
  REQUIRE_POINTER(combine, rows_in);
  if (gates || vectors) REQUIRE_POINTER(combine, gates);
  REQUIRE_POINTER(combine, slot_row);
  if (choices) REQUIRE_POINTER(combine, choices);
  if (vectors) REQUIRE_POINTER(combine, vectors);
  REQUIRE(combine, tokens, 1 <= tokens && tokens <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(combine, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(combine, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(combine, hidden, 1 <= hidden && hidden <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(combine, hidden);
  REQUIRE(combine, slots, 1 <= slots && slots <= experts && (choices || !gates || slots == experts),
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(combine, tokens, tokens <= INT32_MAX / slots, ROUTEGRAD_OVERFLOW);
  const Combine p{static_cast<bf16*>(y),
                  static_cast<const bf16*>(rows_in),
                  gates,
                  vectors,
                  {slot_row, choices, slots, experts, static_cast<uint32_t>(rows)},
                  tokens,
                  hidden,
                  accumulate != 0};
  if (vectors) {
    if (experts <= 16) return launch_with_vectors<1, 1>(p, stream);
    if (experts <= 32) return launch_with_vectors<2, 1>(p, stream);
    if (experts <= 64) return launch_with_vectors<4, 1>(p, stream);
    if (experts <= 128) return launch_with_vectors<2, 4>(p, stream);
    return launch_with_vectors<2, 8>(p, stream);
  }
  const int segments = (hidden + kSegment - 1) / kSegment;
  const int64_t blocks = (tokens * segments + kRowThreads / 32 - 1) / (kRowThreads / 32);
  REQUIRE(combine, tokens, blocks <= INT32_MAX, ROUTEGRAD_OVERFLOW);
  return launch(combine_rows, {dim3(static_cast<uint32_t>(blocks)), kRowThreads}, stream, p, segments);
}

}  // namespace ROUTEGRAD_VARIANT
