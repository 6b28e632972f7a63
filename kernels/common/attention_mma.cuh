// What the attention kernels share on GPUs without TMA and wgmma. Blocks of two warpgroups, all of which load and multiply;
// a warp owns 16 of the 128 rows that a block holds, and the accumulators of a row of mma.sync lie as those of wgmma, so
// that masks, softmax, packing and RoPE are the same code.
#pragma once
#include "attention_shape.cuh"
#include "epilogue_store_bf16.cuh"
#include "mma_fragment.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kAttentionMmaThreads = 256;

// Rows of a sequence of a matrix [B·S, width].
struct SequenceRows {
  const bf16* data;  // of the sequence's first row
  int64_t width;
  int sequence;

  DEV SequenceRows(const void* base, int64_t columns, int in_sequence, int length)
      : data(static_cast<const bf16*>(base) + static_cast<int64_t>(in_sequence) * length * columns),
        width(columns),
        sequence(length) {}
};

// ROWS rows and D columns of a head by cp.async of all threads, as load_head lays them down: atoms of ROWS rows by 64
// columns. Rows past the sequence are zero.
template <int D, int ROWS>
DEV void copy_head(bf16* tile, const SequenceRows& from, int column, int row) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < ROWS * kChunks / kAttentionMmaThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kAttentionMmaThreads, r = index / kChunks, chunk = index % kChunks;
    const bool valid = row + r < from.sequence;
    bf16* const to = tile + chunk / 8 * ROWS * 64 + r * 64 + (chunk % 8 ^ (r & 7)) * 8;
    cp_async_16(to, from.data + (valid ? (row + r) * from.width + column + chunk * 8 : 0), valid ? 16 : 0);
  }
}

// scores[16, 16 PAIRS] = held · streamedᵀ: 16 rows from `row` of a tile of 128, times the rows of a tile of 16 PAIRS.
template <int D, int PAIRS>
DEV void multiply_heads(float (&scores)[8 * PAIRS], const bf16* held, int row, const bf16* streamed) {
#pragma unroll
  for (int i = 0; i < 8 * PAIRS; ++i) scores[i] = 0;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[1][4], b[PAIRS][4];
    load_fragment_a<Major::K>(a, held, 128, row, k);
    load_fragments_b<Major::K>(b, streamed, 16 * PAIRS, 0, k);
    mma_row(scores, a[0], b);
  }
}

// sum[16, D] += a · rows: a [16, 16 STEPS] in registers, `rows` a tile of 16 STEPS rows.
template <int D, int STEPS>
DEV void accumulate_rows(float (&sum)[D / 2], const uint32_t (&a)[STEPS][4], const bf16* rows) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int first = 0; first < D; first += 64) {
      uint32_t b[4][4];
      load_fragments_b<Major::MN>(b, rows, 16 * STEPS, first, 16 * step);
      mma_row(sum + first / 2, a[step], b);
    }
}

// 64 rows of a head leave as bf16(factor[h] · d).
template <int D>
DEV void store_head_rows(MmaStaging& staging, const Bf16Output& out, const float (&d)[D / 2], const float (&factor)[2],
                         int column, int row, int in_sequence, int sequence) {
  const Fragment at({0, 0, in_sequence * sequence + row, min(64, sequence - row), 0, 0, 0}, 0, false);
#pragma unroll
  for (int box = 0; box < D / 64; ++box)
    out.store<64>(at, column + 64 * box, 0, staging, [&](int j, int h) {
      const float* const v = d + 32 * box + 4 * j + 2 * h;
      return pack_bf16(v[0] * factor[h], v[1] * factor[h]);
    });
}

}  // namespace ROUTEGRAD_VARIANT
