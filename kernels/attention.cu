// attention_forward: causal attention on the fused projection, grouped queries, packed documents.
//   P = softmax(Q Kᵀ / √d) over the keys first_key[r] … r of row r;  out[r] = P V;  log_sum_exp = log Σ exp(scores / √d)
// qkv [T, (H + 2 Hkv)·d] and first_key [T]: common/attention_shape.cuh. out [T, H·d] bf16, log_sum_exp [B, H, S] f32, both
// assigned; T = B·S, S = `sequence`. A row that sees no key gets zeros and -inf. d = 64 or 128. Rows of other sequences
// are never read into a product; a NaN in a value spoils, besides the rows that see it, rows of its sequence in the same
// tiles of 128 (0 · NaN).
//
// Deterministic: each row belongs to one warpgroup, which takes the keys in tiles of 128 from the diagonal to the left.
// Scores, maxima, sums and out in f32; P is rounded to bf16 for P V (its sum is of the f32 values).
//
// Three warpgroups a block, one block a multiprocessor, persistent. Warpgroup 0 loads Q (128 rows) and a ring of K and V
// tiles (128 rows) by TMA. Warpgroups 1 and 2 take 64 rows of Q each: S = Q Kᵀ of a tile is issued together with
// out += P V of the tile before, so that the softmax of the one runs beside the other; and they issue by turns, so that
// the softmax of one warpgroup runs beside the products of the other.
//
// Clocks of 64 rows by 128 keys at d = 128 (64), one multiprocessor: products, m64nNk16 taking N / 2: 512 + 512 (256 +
// 256). Exponentials, 8192 at 16 a clock: 512. Other instructions of the softmax, 4 a score (largest, scale, sum, half a
// conversion) and d / 2 of rescaling a row, at 128 lanes a clock: 290 (270). K and V from L2 for two warpgroups: 64 KB
// (32 KB) in 2048 (1024) clocks, 32 bytes a clock. Were all of it hidden, products would bound both (the exponentials of
// d = 64 stand level with its products). Not hidden: at d = 128 some 10% around barriers and the first and last tile of a
// row, at d = 64, where either unit waits for the other in turn, some 40%. Expected at S = 2048, with half of the diagonal
// tile wasted (6%): 75 - 80% of the dense product's speed at d = 128, 50 - 55% at d = 64; of the peak of 989 TFLOP/s, which
// a dense product uses to 80%, that is 60 - 64% and 40 - 44%. Nothing of this is measured yet.
//
// FLOPs: 4·128²·d·H·B·n (n + 1) / 2, n = ⌈S / 128⌉, without documents. Bytes: 4·T·(H + Hkv)·d + 4·T·H, and from L2 K and V
// again for each tile of queries. Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/attention_mma.cuh"
#include "common/attention_shape.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kTile = 128;  // rows of queries of a block, and of keys of a step

template <int D>
struct alignas(1024) ForwardShared {
  static constexpr int kStages = 256 / D;
  bf16 q[kTile * D], k[kStages][kTile * D], v[kStages][kTile * D];
  Staging::Buffers staging[2];
  uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Tiles of keys that a tile of queries sees: from its own number down to the one that is returned.
DEV int first_key_tile(const AttentionShape& shape, const AttentionOrder::Place& place) {
  return min(shape.first_visible(place.sequence, place.tile * kTile) / kTile, place.tile);
}

template <int D>
DEV void produce(ForwardShared<D>& s, const TensorMap* qkv, const AttentionShape& shape, const AttentionOrder& order) {
  using Step = RingStep<ForwardShared<D>::kStages, uint32_t>;
  AttentionOrder::Place place;
  uint32_t number = 0;
  tma_prefetch(qkv);
  for (int turn = 0; order.at(turn, place); ++turn) {
    const int key_column = (shape.heads + shape.key_head(place.head)) * D;
    const int value_column = key_column + shape.key_value_heads * D;
    mbar_wait(&s.q_empty, (turn & 1) ^ 1);
    mbar_expect_tx(&s.q_full, sizeof s.q);
    load_head<D, kTile>(s.q, qkv, &s.q_full, place.head * D, place.tile * kTile, place.sequence);
    const int last = first_key_tile(shape, place);
    for (int tile = place.tile; tile >= last; --tile, ++number) {
      const Step at(number);
      mbar_wait(&s.k_empty[at.stage], at.parity ^ 1);
      mbar_expect_tx(&s.k_full[at.stage], sizeof s.q);
      load_head<D, kTile>(s.k[at.stage], qkv, &s.k_full[at.stage], key_column, tile * kTile, place.sequence);
      mbar_wait(&s.v_empty[at.stage], at.parity ^ 1);
      mbar_expect_tx(&s.v_full[at.stage], sizeof s.q);
      load_head<D, kTile>(s.v[at.stage], qkv, &s.v_full[at.stage], value_column, tile * kTile, place.sequence);
    }
  }
}

// ---- products, issued and committed
template <int D>
DEV void multiply_scores(float (&scores)[kTile / 2], const ForwardShared<D>& s, int warpgroup, int stage) {
#pragma unroll
  for (int k16 = 0; k16 < D / 16; ++k16)
    wgmma<kTile>(scores, wgmma_descriptor<Major::K>(s.q + warpgroup * 64 * 64, k16, kTile, D),
                 wgmma_descriptor<Major::K>(s.k[stage], k16, kTile, D), k16 > 0);
  wgmma_commit();
}
template <int D>
DEV void multiply_values(float (&out)[D / 2], const uint32_t (&p)[kTile / 16][4], const ForwardShared<D>& s, int stage,
                         bool accumulate) {
#pragma unroll
  for (int k16 = 0; k16 < kTile / 16; ++k16)
    wgmma_a_registers<D, Major::MN>(out, p[k16], wgmma_descriptor<Major::MN>(s.v[stage], k16, D, kTile),
                                    accumulate || k16 > 0);
  wgmma_commit();
}

// ---- the softmax of a thread's two rows, tile by tile
struct RowSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // over this thread's columns

  // Scores become exp2(scale (score - largest)), the rows' largest so far; what was summed before must be multiplied by
  // `factor`.
  template <int R>
  DEV void update(float (&scores)[R], float scale, float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = largest[h];
#pragma unroll
      for (int i = 0; i < R / 2; ++i) most = fmaxf(most, scores[i / 2 * 4 + 2 * h + i % 2]);
      most = quad_max(most);
      const float shift = most == -INFINITY ? 0 : most * scale;  // no key yet: all powers are 0
      factor[h] = exp2_approximate(fmaf(largest[h], scale, -shift));
      largest[h] = most;
      float added = 0;
#pragma unroll
      for (int i = 0; i < R / 2; ++i) {
        float& score = scores[i / 2 * 4 + 2 * h + i % 2];
        score = exp2_approximate(fmaf(score, scale, -shift));
        added += score;
      }
      sum[h] = fmaf(sum[h], factor[h], added);
    }
  }
  // The whole row's sum.
  DEV float total(int h) const { return quad_sum(sum[h]); }
};

// The factors of out, and log Σ exp of the thread's two rows.
template <int D>
DEV void finish_rows(const RowSoftmax& rows, float (&factor)[2], float* log_sum_exp, const AttentionShape& shape,
                     const AttentionOrder::Place& place, const int (&row)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = rows.total(h);
    factor[h] = sum == 0 ? 0 : 1 / sum;
    const int64_t line = (static_cast<int64_t>(place.sequence) * shape.heads + place.head) * shape.sequence + row[h];
    if (fragment_column() == 0 && row[h] < shape.sequence)
      st_global(log_sum_exp + line,
                sum == 0 ? -INFINITY : (rows.largest[h] * kExponentScale<D> + log2f(sum)) * kLn2);
  }
}

template <int D>
DEV void consume(ForwardShared<D>& s, const TensorMap* map_out, float* log_sum_exp, const AttentionShape& shape,
                 const AttentionOrder& order) {
  using Step = RingStep<ForwardShared<D>::kStages, uint32_t>;
  const int warpgroup = threadIdx.x / 128 - 1;
  Staging staging(s.staging[warpgroup], nullptr, warpgroup);
  AttentionOrder::Place place;
  uint32_t number = 0;  // of the key tile
  first_turn(warpgroup);
  for (int turn = 0; order.at(turn, place); ++turn) {
    const int first_row = place.tile * kTile + 64 * warpgroup, last_tile = first_key_tile(shape, place);
    const int row[2] = {first_row + fragment_row(0), first_row + fragment_row(1)};
    const int first[2] = {shape.first_visible(place.sequence, row[0]), shape.first_visible(place.sequence, row[1])};
    const int latest_first = __shfl_sync(~0u, shape.first_visible(place.sequence, first_row + 63), 0);
    float scores[kTile / 2], out[D / 2], factor[2];
    uint32_t p[kTile / 16][4];
    RowSoftmax rows;

    mbar_wait(&s.q_full, turn & 1);
    Step at(number);
    begin_turn(warpgroup);
    mbar_wait(&s.k_full[at.stage], at.parity);
    pin_registers(scores);
    wgmma_fence();
    multiply_scores<D>(scores, s, warpgroup, at.stage);
    end_turn(warpgroup);
    wgmma_wait<0>(scores);
    release(&s.k_empty[at.stage]);
    mask_scores(scores, first, row, place.tile * kTile);
    rows.update(scores, kExponentScale<D>, factor);
    pack_operand(p, scores);
    pin_registers(out);

    for (int tile = place.tile - 1; tile >= last_tile; --tile) {
      const Step next(++number);
      begin_turn(warpgroup);
      mbar_wait(&s.k_full[next.stage], next.parity);
      wgmma_fence();
      multiply_scores<D>(scores, s, warpgroup, next.stage);
      mbar_wait(&s.v_full[at.stage], at.parity);
      wgmma_fence();  // again: the wait is a loop, and ptxas would serialise
      multiply_values<D>(out, p, s, at.stage, tile < place.tile - 1);
      end_turn(warpgroup);
      wgmma_wait<1>(scores);
      release(&s.k_empty[next.stage]);
      if (latest_first > tile * kTile) mask_scores(scores, first, row, tile * kTile);
      rows.update(scores, kExponentScale<D>, factor);
      wgmma_wait<0>(out);
      release(&s.v_empty[at.stage]);
      pin_registers(scores);  // p may change only now
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= factor[i / 2 % 2];
      pack_operand(p, scores);
      at = next;
    }
    release(&s.q_empty);
    mbar_wait(&s.v_full[at.stage], at.parity);
    wgmma_fence();
    multiply_values<D>(out, p, s, at.stage, last_tile < place.tile);
    wgmma_wait<0>(out);
    release(&s.v_empty[at.stage]);
    ++number;

    finish_rows<D>(rows, factor, log_sum_exp, shape, place, row);
    if (first_row < shape.sequence)
      store_head<D>(staging, map_out, out, factor, place.head * D, first_row, place.sequence);
  }
  staging.drain();
}

template <int D>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_forward_kernel(const __grid_constant__ TensorMap map_qkv, const __grid_constant__ TensorMap map_out,
                             float* log_sum_exp, const __grid_constant__ AttentionShape shape,
                             const __grid_constant__ AttentionOrder order) {
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(ForwardShared<D>, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.q_full, 1);
    mbar_init(&s.q_empty, 8);
    for (int stage = 0; stage < ForwardShared<D>::kStages; ++stage) {
      mbar_init(&s.k_full[stage], 1);
      mbar_init(&s.k_empty[stage], 8);
      mbar_init(&s.v_full[stage], 1);
      mbar_init(&s.v_empty[stage], 8);
    }
    fence_mbar_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    if (threadIdx.x == 0) produce<D>(s, &map_qkv, shape, order);
  } else {
    setmaxnreg_inc<240>();
    consume<D>(s, &map_out, log_sum_exp, shape, order);
  }
}

// ---- the same without wgmma: keys in steps of 64, K and V one step ahead
constexpr int kMmaKeys = 64;

template <int D>
struct alignas(1024) ForwardMmaShared {
  union {
    bf16 q[kTile * D];
    MmaStaging::Buffers staging[2];  // of each warpgroup, once Q is in registers
  };
  bf16 k[2][kMmaKeys * D], v[2][kMmaKeys * D];
};

// A tile of 128 queries; the keys of its own rows first, then to the left.
template <int D>
DEV void attend(ForwardMmaShared<D>& s, const Bf16Output& out_rows, float* log_sum_exp, const void* qkv,
                const AttentionShape& shape, const AttentionOrder::Place& place) {
  const int warpgroup = threadIdx.x / 128, warp_row = threadIdx.x / 32 * 16;
  const int first_row = place.tile * kTile + 64 * warpgroup, warp_first = place.tile * kTile + warp_row;
  const int row[2] = {first_row + fragment_row(0), first_row + fragment_row(1)};
  const int first[2] = {shape.first_visible(place.sequence, row[0]), shape.first_visible(place.sequence, row[1])};
  const int latest_first = shape.first_visible(place.sequence, warp_first + 15);
  const int key_column = (shape.heads + shape.key_head(place.head)) * D;
  const int value_column = key_column + shape.key_value_heads * D;
  const int last_step = 2 * place.tile + 1;
  const int first_step = min(shape.first_visible(place.sequence, place.tile * kTile) / kMmaKeys, last_step);
  const SequenceRows rows_in(qkv, int64_t{shape.heads + 2 * shape.key_value_heads} * D, place.sequence, shape.sequence);
  const auto load = [&](bf16(&tiles)[2][kMmaKeys * D], int column, int step) {
    if (step >= first_step) copy_head<D, kMmaKeys>(tiles[step % 2], rows_in, column, step * kMmaKeys);
    cp_async_commit();  // also of nothing, so that waits can count
  };
  copy_head<D, kTile>(s.q, rows_in, place.head * D, place.tile * kTile);
  load(s.k, key_column, last_step);
  load(s.v, value_column, last_step);
  float scores[kMmaKeys / 2], out[D / 2] = {}, factor[2];
  RowSoftmax rows;
  for (int step = last_step; step >= first_step; --step) {
    const int key = step * kMmaKeys;
    const bool sees = key <= warp_first + 15;  // the warp's last row sees the first key
    uint32_t p[kMmaKeys / 16][4];
    cp_async_wait<1>();
    __syncthreads();  // K has landed, and the step before is read
    load(s.k, key_column, step - 1);
    if (sees) {
      multiply_heads<D, kMmaKeys / 16>(scores, s.q, warp_row, s.k[step % 2]);
      if (latest_first > key || key + kMmaKeys - 1 > warp_first) mask_scores(scores, first, row, key);
      rows.update(scores, kExponentScale<D>, factor);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= factor[i / 2 % 2];
      pack_operand(p, scores);
    }
    cp_async_wait<1>();
    __syncthreads();  // V has landed
    load(s.v, value_column, step - 1);
    if (sees) accumulate_rows<D>(out, p, s.v[step % 2]);
  }
  cp_async_wait<0>();
  // Everybody has read Q before the wait for the last V: staging buffers lie there now.
  finish_rows<D>(rows, factor, log_sum_exp, shape, place, row);
  if (first_row < shape.sequence) {
    MmaStaging staging(s.staging[warpgroup], warpgroup);
    store_head_rows<D>(staging, out_rows, out, factor, place.head * D, first_row, place.sequence, shape.sequence);
  }
  __syncthreads();
}

template <int D>
__global__ void __launch_bounds__(kAttentionMmaThreads, 1)
    attention_forward_mma_kernel(const __grid_constant__ Bf16Output out, float* log_sum_exp, const void* qkv,
                                 const __grid_constant__ AttentionShape shape,
                                 const __grid_constant__ AttentionOrder order) {
  if constexpr (!kCompilesAmpere) return;
  DYNAMIC_SHARED(ForwardMmaShared<D>, s);
  static_assert(shared_bytes<ForwardMmaShared<D>> <= 99 * 1024);
  AttentionOrder::Place place;
  for (int turn = 0; order.at(turn, place); ++turn) attend<D>(s, out, log_sum_exp, qkv, shape, place);
}

template <int D>
routegrad_status launch_forward(void* out, float* log_sum_exp, const void* qkv, const AttentionShape& shape,
                                routegrad_stream stream) {
  TensorMap map_qkv, map_out;
  const int64_t width = int64_t{shape.heads} * D;
  if (const auto bad = sequence_map(&map_qkv, qkv, shape, width + int64_t{2} * shape.key_value_heads * D)) return bad;
  if (const auto bad = sequence_map(&map_out, out, shape, width)) return bad;
  const AttentionOrder order =
      attention_order(shape, shape.heads, shape.heads / shape.key_value_heads, int64_t{4} * shape.sequence * D, true);
  const int tiles = order.tiles * order.pairs, room = multiprocessors();
  if constexpr (kForAmpere)
    if (!on_hopper())
      return launch(attention_forward_mma_kernel<D>,
                    {dim3(static_cast<uint32_t>(tiles < room ? tiles : room)), kAttentionMmaThreads,
                     shared_bytes<ForwardMmaShared<D>>},
                    stream, Bf16Output{{}, static_cast<bf16*>(out), static_cast<int>(width), 1}, log_sum_exp, qkv, shape,
                    order);
  return launch(attention_forward_kernel<D>,
                {dim3(static_cast<uint32_t>(tiles < room ? tiles : room)), kAttentionThreads, shared_bytes<ForwardShared<D>>},
                stream, map_qkv, map_out, log_sum_exp, shape, order);
}

}  // namespace

routegrad_status attention_forward(void* out, float* log_sum_exp, const void* qkv, const int32_t* first_key,
                                   int64_t tokens, int32_t sequence, int32_t heads, int32_t key_value_heads,
                                   int32_t head_width, routegrad_stream stream) {
  REQUIRE_POINTER(attention_forward, out);
  REQUIRE_POINTER(attention_forward, log_sum_exp);
  REQUIRE_ATTENTION(attention_forward);
  const AttentionShape shape{first_key, static_cast<int>(tokens / sequence), sequence, heads, key_value_heads};
  return head_width == 64 ? launch_forward<64>(out, log_sum_exp, qkv, shape, stream)
                          : launch_forward<128>(out, log_sum_exp, qkv, shape, stream);
}

}  // namespace ROUTEGRAD_VARIANT
