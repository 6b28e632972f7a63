// attention_backward: the gradient of attention_forward, from its outputs and dout.
//   delta[r] = ⟨dout[r], out[r]⟩;  P = exp(S / √d - log_sum_exp), S = Q Kᵀ;  dS = P ⊙ (dout Vᵀ - delta) / √d
//   dQ = dS K;  dK = dSᵀ Q and dV = Pᵀ dout, summed over the query heads of a key head
// Where cosines and sines [S, d/2] f32 are given, qkv was turned by them (rope.cu), and dQ and dK are turned back before they
// are rounded: dqkv is the gradient of what was turned.
// dqkv [T, (H + 2 Hkv)·d] bf16, assigned; dout, out [T, H·d] bf16; qkv, log_sum_exp, first_key and sizes as
// attention_forward has them. workspace: attention_backward_workspace floats, of each row log_sum_exp for powers of two
// (+inf for rows that see nothing: their P is 0) and delta, rows padded to S' = S rounded up to 128.
//
// Deterministic: no atomics. dQ has a pass of its own by tiles of queries (dK and dV: of keys), which forms S and dout Vᵀ
// once more: 7 products in place of 5, for which nothing of size S² is stored and no block waits for another. Keys
// ascend in dQ; in dK and dV query heads ascend, then queries. P and dS are rounded to bf16 as operands, sums are f32.
//
// Both passes are one loop: 128 rows are held (keys and values, or queries and dout: 64 a warpgroup), the others stream
// past in steps through a ring, S and dP are formed with the held rows as rows, and stay in registers as operands A of
// the sums: held X, Y; streamed x, y; S = X xᵀ, dP = Y yᵀ; sum += dS x, and for keys also sum += P y. Warpgroup 0 loads.
//
// Clocks of a step of 64 held and 64 streamed rows at d = 128 (64): products 4·256 (128) for keys, 3·256 (128) for
// queries; exponentials 256; other instructions some 9 a score at 128 lanes a clock: 290. Products of a step run beside
// the other warpgroup's arithmetic. Were all of it hidden, 7 products do the work of 5: 71% of the dense product's speed
// at d = 128 by FLOPs that count; at d = 64 arithmetic (550) stands level with products (512 and 384): 50%. Expected,
// with a fifth lost between: 55% and 40%.
//
// FLOPs: 2·128·d·H·B·(4·64·Σ steps of keys + 3·r·Σ steps of queries), steps of 64 (queries at d = 64: of r = 128) rows that
// a tile of 128 sees. Bytes: 6·T·(H + Hkv)·d + 2·T·H·d + 16·B·H·S', tiles of other rows again from L2.
// Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/attention_backward_mma.cuh"
#include "common/attention_shape.cuh"
#include "common/rope_fragment.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kTile = 128;

// ---- per row: log Σ exp for powers of two, delta
struct RowStatistics {
  float* base;     // [2, B·H, padded]
  int64_t lines;   // B·H
  int64_t padded;  // S'
  HOST_DEV float* log2_sum(int64_t line) const { return base + line * padded; }
  HOST_DEV float* delta(int64_t line) const { return base + (lines + line) * padded; }
};
constexpr int64_t padded_sequence(int64_t sequence) { return (sequence + kTile - 1) / kTile * kTile; }

constexpr int kStatisticsThreads = 256;

// D / 8 lanes a row of a head, 16 bytes each. Rows past a sequence's end: P = 0.
template <int D>
__global__ void __launch_bounds__(kStatisticsThreads)
    attention_statistics_kernel(RowStatistics statistics, const bf16* dout, const bf16* out, const float* log_sum_exp,
                                const __grid_constant__ AttentionShape shape) {
  constexpr int kLanes = D / 8;
  const int64_t index = (int64_t{blockIdx.x} * kStatisticsThreads + threadIdx.x) / kLanes;  // (sequence, row, head)
  const int64_t place = index / shape.heads, in_sequence = place / statistics.padded;
  const int64_t row = place - in_sequence * statistics.padded, line = in_sequence * shape.heads + index % shape.heads;
  if (in_sequence >= shape.sequences) return;  // whole warps: 128 rows of a head
  const bool there = row < shape.sequence;
  float sum = 0;
  if (there) {
    const int64_t at = ((in_sequence * shape.sequence + row) * shape.heads + index % shape.heads) * D +
                       threadIdx.x % kLanes * 8;
    const auto a = ld_global_readonly(reinterpret_cast<const uint4*>(dout + at));
    const auto b = ld_global_readonly(reinterpret_cast<const uint4*>(out + at));
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(high_bf16(x[i]), high_bf16(y[i]), fmaf(low_bf16(x[i]), low_bf16(y[i]), sum));
  }
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  if (threadIdx.x % kLanes != 0) return;
  const float lse = there ? ld_global_readonly(log_sum_exp + line * shape.sequence + row) : -INFINITY;
  st_global(statistics.log2_sum(line) + row, lse == -INFINITY ? INFINITY : lse * kLog2E);
  st_global(statistics.delta(line) + row, sum);
}

// ---- the two passes
template <int WIDTH, bool OF_KEYS>
struct Pass {
  static constexpr int D = WIDTH;
  static constexpr bool kOfKeys = OF_KEYS;  // holds keys and values; else queries and dout
  static constexpr int kStep = D == 64 && !OF_KEYS ? 128 : 64;
  static constexpr int kStages = D == 64 ? 4 : 3;
  // Whether a step's sums run beside the next step's scores: with 64 rows of dK and dV of d = 128 registers are too few.
  static constexpr bool kSumsLinger = !(D == 128 && OF_KEYS);

  // The streamed rows that a held row needs, low … high; both rise with the row.
  static DEV int low(const AttentionShape& shape, int in_sequence, int row) {
    return OF_KEYS ? row : shape.first_visible(in_sequence, row);
  }
  static DEV int high(const AttentionShape& shape, int in_sequence, int row) {
    return OF_KEYS ? shape.rows_end(in_sequence, row) - 1 : row;
  }
  // First row of the first step, and the end, of a tile.
  struct Range {
    int first, end;
  };
  template <int STEP = kStep>
  static DEV Range range(const AttentionShape& shape, const AttentionOrder::Place& place) {
    const int row = place.tile * kTile;
    return {low(shape, place.sequence, row) / STEP * STEP,
            min(high(shape, place.sequence, row + kTile - 1) + 1, shape.sequence)};
  }
  static DEV int heads_streamed(const AttentionShape& shape) { return OF_KEYS ? shape.heads / shape.key_value_heads : 1; }
};

// Without wgmma: steps of which two fit beside the held rows into 99 KB.
template <int WIDTH, bool OF_KEYS>
struct MmaPass : Pass<WIDTH, OF_KEYS> {
  static constexpr int kStep = WIDTH == 64 ? 64 : 32;
  static DEV auto range(const AttentionShape& shape, const AttentionOrder::Place& place) {
    return Pass<WIDTH, OF_KEYS>::template range<kStep>(shape, place);
  }
};

template <class T>
struct alignas(1024) BackwardShared {
  bf16 held[2][kTile * T::D];
  bf16 streamed[T::kStages][2][T::kStep * T::D];
  Staging::Buffers staging[2];
  alignas(128) float statistics[T::kStages][2][T::kStep];  // of streamed queries
  uint64_t held_full, held_empty, full[T::kStages], empty[T::kStages];
};

struct BackwardMaps {
  TensorMap qkv, dout, dqkv, statistics;
};

template <class T>
DEV void produce(BackwardShared<T>& s, const BackwardMaps& maps, const AttentionShape& shape,
                 const AttentionOrder& order) {
  constexpr int D = T::D;
  AttentionOrder::Place place;
  uint32_t number = 0;
  for (int turn = 0; order.at(turn, place); ++turn) {
    const int row = place.tile * kTile, sequence = place.sequence;
    const int key_head = T::kOfKeys ? place.head : shape.key_head(place.head);
    const int key_column = (shape.heads + key_head) * D, value_column = key_column + shape.key_value_heads * D;
    const int first_head = T::kOfKeys ? key_head * T::heads_streamed(shape) : place.head;
    mbar_wait(&s.held_empty, (turn & 1) ^ 1);
    mbar_expect_tx(&s.held_full, sizeof s.held);
    load_head<D, kTile>(s.held[0], &maps.qkv, &s.held_full, T::kOfKeys ? key_column : place.head * D, row, sequence);
    load_head<D, kTile>(s.held[1], T::kOfKeys ? &maps.qkv : &maps.dout, &s.held_full,
                        T::kOfKeys ? value_column : place.head * D, row, sequence);
    const auto range = T::range(shape, place);
    for (int i = 0; i < T::heads_streamed(shape); ++i)
      for (int at = range.first; at < range.end; at += T::kStep, ++number) {
        const RingStep<T::kStages, uint32_t> to(number);
        const int head = first_head + i, line = sequence * shape.heads + head;
        uint64_t* const full = &s.full[to.stage];
        mbar_wait(&s.empty[to.stage], to.parity ^ 1);
        mbar_expect_tx(full, sizeof s.streamed[0] + (T::kOfKeys ? sizeof s.statistics[0] : 0));
        load_head<D, T::kStep>(s.streamed[to.stage][0], &maps.qkv, full, T::kOfKeys ? head * D : key_column, at, sequence);
        load_head<D, T::kStep>(s.streamed[to.stage][1], T::kOfKeys ? &maps.dout : &maps.qkv, full,
                               T::kOfKeys ? head * D : value_column, at, sequence);
        if constexpr (T::kOfKeys) {
          tma_load_2d(s.statistics[to.stage][0], &maps.statistics, full, at, line);
          tma_load_2d(s.statistics[to.stage][1], &maps.statistics, full, at, shape.sequences * shape.heads + line);
        }
      }
  }
}

// d = 64 held rows times the streamed rows, committed.
template <class T>
DEV void multiply(float (&d)[T::kStep / 2], const bf16* held, const bf16* streamed) {
#pragma unroll
  for (int k16 = 0; k16 < T::D / 16; ++k16)
    wgmma<T::kStep>(d, wgmma_descriptor<Major::K>(held, k16, kTile, T::D),
                    wgmma_descriptor<Major::K>(streamed, k16, T::kStep, T::D), k16 > 0);
  wgmma_commit();
}
// sum += a · streamed rows.
template <class T>
DEV void accumulate(float (&sum)[T::D / 2], const uint32_t (&a)[T::kStep / 16][4], const bf16* streamed) {
#pragma unroll
  for (int k16 = 0; k16 < T::kStep / 16; ++k16)
    wgmma_a_registers<T::D, Major::MN>(sum, a[k16], wgmma_descriptor<Major::MN>(streamed, k16, T::D, T::kStep), true);
}

template <class T>
DEV void consume(BackwardShared<T>& s, const BackwardMaps& maps, const RowStatistics& statistics,
                 const RopeTables& tables, const AttentionShape& shape, const AttentionOrder& order) {
  constexpr int D = T::D, kStep = T::kStep;
  const int warpgroup = threadIdx.x / 128 - 1;
  Staging staging(s.staging[warpgroup], nullptr, warpgroup);
  AttentionOrder::Place place;
  uint32_t number = 0;
  for (int turn = 0; order.at(turn, place); ++turn) {
    const int sequence = place.sequence, first_row = place.tile * kTile + 64 * warpgroup;
    const auto range = T::range(shape, place);
    int low[2], high[2];
    float row_log2_sum[2], row_delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row(h);
      low[h] = T::low(shape, sequence, row), high[h] = T::high(shape, sequence, row);
      if constexpr (!T::kOfKeys) {
        const int64_t line = int64_t{sequence} * shape.heads + place.head;
        row_log2_sum[h] = ld_global_readonly(statistics.log2_sum(line) + row);
        row_delta[h] = ld_global_readonly(statistics.delta(line) + row);
      }
    }
    const int latest_low = T::low(shape, sequence, first_row + 63), earliest_high = T::high(shape, sequence, first_row);
    float scores[kStep / 2], ds[kStep / 2], sum[D / 2], value_sum[D / 2];
    uint32_t p_operand[kStep / 16][4], ds_operand[kStep / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i] = value_sum[i] = 0;
    mbar_wait(&s.held_full, turn & 1);
    const bf16 *const x = s.held[0] + warpgroup * 64 * 64, *const y = s.held[1] + warpgroup * 64 * 64;
    const uint32_t first_number = number;
    const auto give_back = [&](uint32_t step) {
      if constexpr (T::kOfKeys) __syncwarp();  // all lanes have read the statistics
      release(&s.empty[RingStep<T::kStages, uint32_t>(step).stage]);
    };
    for (int i = 0; i < T::heads_streamed(shape); ++i)
      for (int at = range.first; at < range.end; at += kStep, ++number) {
        const RingStep<T::kStages, uint32_t> now(number);
        mbar_wait(&s.full[now.stage], now.parity);
        wgmma_fence();
        multiply<T>(scores, x, s.streamed[now.stage][0]);
        multiply<T>(ds, y, s.streamed[now.stage][1]);
        wgmma_wait<1>(scores);
        if (T::kSumsLinger && number != first_number) give_back(number - 1);
        if (at < latest_low || at + kStep - 1 > earliest_high) mask_scores(scores, low, high, at);
#pragma unroll
        for (int j = 0; j < kStep / 8; ++j) {
          float2 log2_sum{};
          if constexpr (T::kOfKeys)
            log2_sum = *reinterpret_cast<const float2*>(s.statistics[now.stage][0] + 8 * j + fragment_column());
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float shift = T::kOfKeys ? (k % 2 ? log2_sum.y : log2_sum.x) : row_log2_sum[k / 2];
            scores[4 * j + k] = exp2_approximate(fmaf(scores[4 * j + k], kExponentScale<D>, -shift));
          }
        }
        if constexpr (T::kOfKeys) pack_operand(p_operand, scores);
        wgmma_wait<0>(ds);
#pragma unroll
        for (int j = 0; j < kStep / 8; ++j) {
          float2 delta{};
          if constexpr (T::kOfKeys)
            delta = *reinterpret_cast<const float2*>(s.statistics[now.stage][1] + 8 * j + fragment_column());
#pragma unroll
          for (int k = 0; k < 4; ++k)
            ds[4 * j + k] = scores[4 * j + k] *
                            (ds[4 * j + k] - (T::kOfKeys ? (k % 2 ? delta.y : delta.x) : row_delta[k / 2]));
        }
        pack_operand(ds_operand, ds);
        wgmma_fence();
        if constexpr (T::kOfKeys) accumulate<T>(value_sum, p_operand, s.streamed[now.stage][1]);
        accumulate<T>(sum, ds_operand, s.streamed[now.stage][0]);
        wgmma_commit();
        if constexpr (!T::kSumsLinger) {
          wgmma_wait<0>();
          give_back(number);
        }
      }
    wgmma_wait<0>(sum);
    if constexpr (T::kOfKeys) wgmma_wait<0>(value_sum);
    if (T::kSumsLinger && number != first_number) give_back(number - 1);
    release(&s.held_empty);
    if (first_row >= shape.sequence) continue;
    if (tables.cosines) {
      int position[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) position[h] = min(first_row + fragment_row(h), shape.sequence - 1);
      turn_heads<D>(sum, tables, position, 1, -1.0f);
    }
    const float scaled[2] = {kScoreScale<D>, kScoreScale<D>}, plain[2] = {1, 1};
    const int column = (T::kOfKeys ? shape.heads + place.head : place.head) * D;
    store_head<D>(staging, &maps.dqkv, sum, scaled, column, first_row, sequence);
    if constexpr (T::kOfKeys)
      store_head<D>(staging, &maps.dqkv, value_sum, plain, column + shape.key_value_heads * D, first_row, sequence);
  }
  staging.drain();
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ RowStatistics statistics,
                              const __grid_constant__ RopeTables tables, const __grid_constant__ AttentionShape shape,
                              const __grid_constant__ AttentionOrder order) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(BackwardShared<T>, s);
  static_assert(shared_bytes<BackwardShared<T>> <= 227 * 1024);
  if (threadIdx.x == 0) {
    mbar_init(&s.held_full, 1);
    mbar_init(&s.held_empty, 8);
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbar_init(&s.full[stage], 1);
      mbar_init(&s.empty[stage], 8);
    }
    fence_mbar_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    if (threadIdx.x == 0) produce<T>(s, maps, shape, order);
  } else {
    setmaxnreg_inc<240>();
    consume<T>(s, maps, statistics, tables, shape, order);
  }
}

template <class T>
__global__ void __launch_bounds__(kAttentionMmaThreads, 1)
    attention_backward_mma_kernel(const __grid_constant__ BackwardRows rows,
                                  const __grid_constant__ RowStatistics statistics,
                                  const __grid_constant__ RopeTables tables,
                                  const __grid_constant__ AttentionShape shape,
                                  const __grid_constant__ AttentionOrder order) {
  if constexpr (!kCompilesAmpere) return;
  DYNAMIC_SHARED(BackwardMmaShared<T>, s);
  static_assert(shared_bytes<BackwardMmaShared<T>> <= 99 * 1024);
  AttentionOrder::Place place;
  for (int turn = 0; order.at(turn, place); ++turn) backward_tile<T>(s, rows, statistics, tables, shape, place);
}

template <class T>
AttentionOrder pass_order(const AttentionShape& shape) {
  const int group = shape.heads / shape.key_value_heads;
  const int64_t bytes = int64_t{4} * shape.sequence * T::D;  // of the two tensors streamed, for a head
  return T::kOfKeys ? attention_order(shape, shape.key_value_heads, 1, bytes * group, false)
                    : attention_order(shape, shape.heads, group, bytes, true);
}

template <class T>
routegrad_status launch_mma_pass(const BackwardRows& rows, const RowStatistics& statistics, const RopeTables& tables,
                                 const AttentionShape& shape, routegrad_stream stream) {
  const AttentionOrder order = pass_order<T>(shape);
  const int tiles = order.tiles * order.pairs, room = multiprocessors();
  return launch(attention_backward_mma_kernel<T>,
                {dim3(static_cast<uint32_t>(tiles < room ? tiles : room)), kAttentionMmaThreads,
                 shared_bytes<BackwardMmaShared<T>>},
                stream, rows, statistics, tables, shape, order);
}

template <class T>
routegrad_status launch_pass(const BackwardMaps& maps, const RowStatistics& statistics, const RopeTables& tables,
                             const AttentionShape& shape, routegrad_stream stream) {
  const AttentionOrder order = pass_order<T>(shape);
  const int tiles = order.tiles * order.pairs, room = multiprocessors();
  return launch(attention_backward_kernel<T>,
                {dim3(static_cast<uint32_t>(tiles < room ? tiles : room)), kAttentionThreads,
                 shared_bytes<BackwardShared<T>>},
                stream, maps, statistics, tables, shape, order);
}

template <int D>
routegrad_status launch_backward(void* dqkv, const RowStatistics& statistics, const void* dout, const void* qkv,
                                 const void* out, const float* log_sum_exp, const RopeTables& tables,
                                 const AttentionShape& shape, routegrad_stream stream) {
  BackwardMaps maps;
  const int64_t width = int64_t{shape.heads} * D, qkv_width = width + int64_t{2} * shape.key_value_heads * D;
  routegrad_status status = sequence_map(&maps.qkv, qkv, shape, qkv_width);
  if (status == ROUTEGRAD_OK) status = sequence_map(&maps.dqkv, dqkv, shape, qkv_width);
  if (status == ROUTEGRAD_OK) status = sequence_map(&maps.dout, dout, shape, width);
  const auto padded = static_cast<uint64_t>(statistics.padded), lines = static_cast<uint64_t>(statistics.lines);
  if (status == ROUTEGRAD_OK)
    status = make_tensor_map<2>(&maps.statistics, {statistics.base, Element::F32, {padded, 2 * lines}, {4 * padded},
                                                   {Pass<D, true>::kStep, 1}, Swizzle::None});
  const int64_t threads = statistics.lines * statistics.padded * (D / 8);
  if (status == ROUTEGRAD_OK)
    status = launch(attention_statistics_kernel<D>,
                    {dim3(static_cast<uint32_t>((threads + kStatisticsThreads - 1) / kStatisticsThreads)),
                     kStatisticsThreads},
                    stream, statistics, static_cast<const bf16*>(dout), static_cast<const bf16*>(out), log_sum_exp, shape);
  if constexpr (kForAmpere)
    if (status == ROUTEGRAD_OK && !on_hopper()) {
      const BackwardRows rows{qkv, dout, {{}, static_cast<bf16*>(dqkv), static_cast<int>(qkv_width), 1}};
      status = launch_mma_pass<MmaPass<D, true>>(rows, statistics, tables, shape, stream);
      return status == ROUTEGRAD_OK ? launch_mma_pass<MmaPass<D, false>>(rows, statistics, tables, shape, stream) : status;
    }
  if (status == ROUTEGRAD_OK) status = launch_pass<Pass<D, true>>(maps, statistics, tables, shape, stream);
  if (status == ROUTEGRAD_OK) status = launch_pass<Pass<D, false>>(maps, statistics, tables, shape, stream);
  return status;
}

}  // namespace

routegrad_status attention_backward(void* dqkv, float* workspace, const void* dout, const void* qkv, const void* out,
                                    const float* log_sum_exp, const int32_t* first_key, const float* cosines,
                                    const float* sines, int64_t tokens, int32_t sequence, int32_t heads,
                                    int32_t key_value_heads, int32_t head_width, routegrad_stream stream) {
  REQUIRE_POINTER(attention_backward, dqkv);
  REQUIRE_POINTER(attention_backward, workspace);
  REQUIRE_POINTER(attention_backward, dout);
  REQUIRE_POINTER(attention_backward, out);
  REQUIRE_POINTER(attention_backward, log_sum_exp);
  if (cosines) REQUIRE_POINTER(attention_backward, cosines);
  if (cosines) REQUIRE_POINTER(attention_backward, sines);
  if (cosines) REQUIRE(attention_backward, sequence, sequence <= kMaxPositions, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_ATTENTION(attention_backward);
  const AttentionShape shape{first_key, static_cast<int>(tokens / sequence), sequence, heads, key_value_heads};
  const RowStatistics statistics{workspace, int64_t{shape.sequences} * heads, padded_sequence(sequence)};
  return head_width == 64
             ? launch_backward<64>(dqkv, statistics, dout, qkv, out, log_sum_exp, {cosines, sines}, shape, stream)
             : launch_backward<128>(dqkv, statistics, dout, qkv, out, log_sum_exp, {cosines, sines}, shape, stream);
}

routegrad_status attention_backward_workspace(uint64_t* floats, int64_t tokens, int32_t sequence, int32_t heads) {
  REQUIRE(attention_backward_workspace, floats, floats != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(attention_backward_workspace, sequence, 1 <= sequence && sequence <= tokens && tokens % sequence == 0,
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(attention_backward_workspace, heads, 1 <= heads && heads <= 1024, ROUTEGRAD_OUT_OF_RANGE);
  *floats = static_cast<uint64_t>(2 * (tokens / sequence) * heads * padded_sequence(sequence));
  return ROUTEGRAD_OK;
}

}  // namespace ROUTEGRAD_VARIANT
