// A pass of attention_backward (attention_backward.cu) on GPUs without TMA and wgmma: 128 rows are held in shared memory, the
// others stream past in steps, loaded by cp.async one step ahead; a warp owns 16 held rows. T is an MmaPass.
#pragma once
#include "attention_mma.cuh"
#include "rope_fragment.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kHeldRows = 128;

template <class T>
struct alignas(1024) BackwardMmaShared {
  union {
    bf16 held[2][kHeldRows * T::D];
    MmaStaging::Buffers staging[2];  // of each warpgroup, once the held rows are read
  };
  bf16 streamed[2][2][T::kStep * T::D];
  alignas(128) float statistics[2][2][T::kStep];  // of streamed queries
};

struct BackwardRows {
  const void *qkv, *dout;
  Bf16Output dqkv;
};

// What a tile's steps are: query heads ascending (keys are held), then rows.
template <class T>
struct StreamSteps {
  int first, per_head, count;

  DEV StreamSteps(const AttentionShape& shape, const AttentionOrder::Place& place) {
    const auto range = T::range(shape, place);
    first = range.first;
    per_head = max(ceil_div(range.end - range.first, T::kStep), 0);
    count = per_head * T::heads_streamed(shape);
  }
  DEV int row(int step) const { return first + step % per_head * T::kStep; }
};

// Statistics: as attention_backward.cu has them, log2_sum(line) and delta(line) of a row's (sequence, head).
template <class T, class Statistics>
DEV void load_step(BackwardMmaShared<T>& s, const BackwardRows& in, const Statistics& statistics,
                   const AttentionShape& shape, const AttentionOrder::Place& place, const StreamSteps<T>& steps,
                   int step) {
  constexpr int D = T::D;
  if (step < steps.count) {
    const int at = steps.row(step), stage = step % 2;
    const int key_head = T::kOfKeys ? place.head : shape.key_head(place.head);
    const int key_column = (shape.heads + key_head) * D, value_column = key_column + shape.key_value_heads * D;
    const int head = T::kOfKeys ? key_head * T::heads_streamed(shape) + step / steps.per_head : place.head;
    const SequenceRows qkv(in.qkv, in.dqkv.width, place.sequence, shape.sequence);
    const SequenceRows dout(in.dout, int64_t{shape.heads} * D, place.sequence, shape.sequence);
    copy_head<D, T::kStep>(s.streamed[stage][0], qkv, T::kOfKeys ? head * D : key_column, at);
    copy_head<D, T::kStep>(s.streamed[stage][1], T::kOfKeys ? dout : qkv, T::kOfKeys ? head * D : value_column, at);
    if constexpr (T::kOfKeys) {
      constexpr int kChunks = T::kStep / 4;
      const int64_t line = int64_t{place.sequence} * shape.heads + head;
      const int which = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks * 4;
      if (which < 2)
        cp_async_16(s.statistics[stage][which] + chunk,
                    (which ? statistics.delta(line) : statistics.log2_sum(line)) + at + chunk);
    }
  }
  cp_async_commit();  // also of nothing, so that waits can count
}

// The gradients of a warp's 16 held rows, and what they are made of.
template <class T>
struct HeldRows {
  static constexpr int D = T::D, kStep = T::kStep;
  int low[2], high[2];  // the streamed rows that each of the thread's rows needs
  int latest_low, earliest_high;  // of the warp's
  float row_log2_sum[2], row_delta[2];
  float sum[D / 2], value_sum[D / 2];

  template <class Statistics>
  DEV HeldRows(const Statistics& statistics, const AttentionShape& shape, const AttentionOrder::Place& place,
               int warp_row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = place.tile * kHeldRows + warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * h;
      low[h] = T::low(shape, place.sequence, row), high[h] = T::high(shape, place.sequence, row);
      if constexpr (!T::kOfKeys) {
        const int64_t line = int64_t{place.sequence} * shape.heads + place.head;
        row_log2_sum[h] = ld_global_readonly(statistics.log2_sum(line) + row);
        row_delta[h] = ld_global_readonly(statistics.delta(line) + row);
      }
    }
    latest_low = T::low(shape, place.sequence, place.tile * kHeldRows + warp_row + 15);
    earliest_high = T::high(shape, place.sequence, place.tile * kHeldRows + warp_row);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i] = value_sum[i] = 0;
  }

  DEV void add_step(const BackwardMmaShared<T>& s, int warp_row, int at, int stage) {
    const bf16 *const x = s.streamed[stage][0], *const y = s.streamed[stage][1];
    float scores[kStep / 2], ds[kStep / 2];
    uint32_t operand[kStep / 16][4];
    multiply_heads<D, kStep / 16>(scores, s.held[0], warp_row, x);
    if (at < latest_low || at + kStep - 1 > earliest_high) mask_scores(scores, low, high, at);
    each_column(s.statistics[stage][0], row_log2_sum, [&](int i, float log2_sum) {
      scores[i] = exp2_approximate(fmaf(scores[i], kExponentScale<D>, -log2_sum));
    });
    if constexpr (T::kOfKeys) {
      pack_operand(operand, scores);
      accumulate_rows<D>(value_sum, operand, y);
    }
    multiply_heads<D, kStep / 16>(ds, s.held[1], warp_row, y);
    each_column(s.statistics[stage][1], row_delta, [&](int i, float delta) { ds[i] = scores[i] * (ds[i] - delta); });
    pack_operand(operand, ds);
    accumulate_rows<D>(sum, operand, x);
  }

  // f(element of the fragment, the statistic of its query): of streamed queries by column, of held ones by row.
  template <class F>
  static DEV void each_column(const float (&of_column)[kStep], const float (&of_row)[2], const F& f) {
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
      float2 pair{};
      if constexpr (T::kOfKeys) pair = *reinterpret_cast<const float2*>(of_column + 8 * j + fragment_column());
#pragma unroll
      for (int k = 0; k < 4; ++k) f(4 * j + k, T::kOfKeys ? (k % 2 ? pair.y : pair.x) : of_row[k / 2]);
    }
  }
};

template <class T, class Statistics>
DEV void backward_tile(BackwardMmaShared<T>& s, const BackwardRows& in, const Statistics& statistics,
                       const RopeTables& tables, const AttentionShape& shape, const AttentionOrder::Place& place) {
  constexpr int D = T::D;
  const int warpgroup = threadIdx.x / 128, warp_row = threadIdx.x / 32 * 16;
  const int first_row = place.tile * kHeldRows + 64 * warpgroup;
  const int column = (T::kOfKeys ? shape.heads + place.head : place.head) * D, values = shape.key_value_heads * D;
  const SequenceRows qkv(in.qkv, in.dqkv.width, place.sequence, shape.sequence);
  const SequenceRows dout(in.dout, int64_t{shape.heads} * D, place.sequence, shape.sequence);
  copy_head<D, kHeldRows>(s.held[0], qkv, column, place.tile * kHeldRows);
  copy_head<D, kHeldRows>(s.held[1], T::kOfKeys ? qkv : dout, T::kOfKeys ? column + values : column,
                          place.tile * kHeldRows);
  const StreamSteps<T> steps(shape, place);
  load_step<T>(s, in, statistics, shape, place, steps, 0);
  HeldRows<T> rows(statistics, shape, place, warp_row);
  for (int step = 0; step < steps.count; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // the step has landed, and the one before is read
    load_step<T>(s, in, statistics, shape, place, steps, step + 1);
    rows.add_step(s, warp_row, steps.row(step), step % 2);
  }
  cp_async_wait<0>();
  __syncthreads();  // the held rows are read: staging buffers lie there now
  if (first_row < shape.sequence) {
    if (tables.cosines) {
      int position[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) position[h] = min(first_row + fragment_row(h), shape.sequence - 1);
      turn_heads<D>(rows.sum, tables, position, 1, -1.0f);
    }
    MmaStaging staging(s.staging[warpgroup], warpgroup);
    const float scaled[2] = {kScoreScale<D>, kScoreScale<D>}, plain[2] = {1, 1};
    store_head_rows<D>(staging, in.dqkv, rows.sum, scaled, column, first_row, place.sequence, shape.sequence);
    if constexpr (T::kOfKeys)
      store_head_rows<D>(staging, in.dqkv, rows.value_sum, plain, column + values, first_row, place.sequence,
                         shape.sequence);
  }
  __syncthreads();
}

}  // namespace ROUTEGRAD_VARIANT
