// Epilogue of the output head: out = d in f32, as epilogue_store_f32.cuh stores it, and beside it what the loss needs to know
// of each row: for every 128 columns their maximum m and Σ exp(z − m), statistics [rows, ⌈width / 128⌉] of two f32. So the
// logits need not be read for their logsumexp.
//
// Columns past the width do not count, whatever their products are. A NaN shows in the sum. The exponentials of 32 columns
// follow the store of those columns, which is under way meanwhile.
// Order of a sum: a thread's columns ascending, then over the four lanes of a row (1, 2). The same for every tile shape.
#pragma once
#include "epilogue_store_f32.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kStatisticColumns = 128;

DEV float exp_difference(float a, float b) {
  constexpr float kLog2E = 1.44269504f;
  return exp2_approximate((a - b) * kLog2E);
}

// The maximum of logits and Σ exp(z − maximum).
struct Softmax {
  float largest = -3.402823466e38f, sum = 0;  // not −∞: −∞ − (−∞) would be NaN

  DEV void join(Softmax other) {
    const float most = fmaxf(largest, other.largest);
    sum = sum * exp_difference(largest, most) + other.sum * exp_difference(other.largest, most);
    largest = most;
  }
};

struct LogitStatistics {
  float2* out;  // [rows, ⌈width / kStatisticColumns⌉]
  int width;

  // store_piece(z, first) stores the 32 columns from column `first` of the fragment on, z being the thread's values there.
  template <int COLUMNS, class StorePiece>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, const StorePiece& store_piece) const {
    static_assert(COLUMNS % kStatisticColumns == 0);
#pragma unroll
    for (int block = 0; block < COLUMNS; block += kStatisticColumns) {
      const int column = at.first_column + block;
      if (column >= width) return;
      float z[kStatisticColumns / 2];
#pragma unroll
      for (int i = 0; i < kStatisticColumns / 2; ++i) z[i] = d[block / 2 + i];
      // The last columns: the width is a multiple of 8, and nothing past it is stored.
      if (column + kStatisticColumns > width)
#pragma unroll
        for (int i = 0; i < kStatisticColumns / 2; ++i)
          if (column + i / 4 * 8 >= width) z[i] = -INFINITY;
      Softmax row[2];
#pragma unroll
      for (int i = 0; i < kStatisticColumns / 2; ++i) row[i / 2 % 2].largest = fmaxf(row[i / 2 % 2].largest, z[i]);
#pragma unroll
      for (int h = 0; h < 2; ++h) row[h].largest = quad_max(row[h].largest);
#pragma unroll
      for (int first = 0; first < kStatisticColumns; first += 32) {
        store_piece(z + first / 2, block + first);
#pragma unroll
        for (int i = first / 2; i < first / 2 + 16; ++i)
          row[i / 2 % 2].sum += exp_difference(z[i], row[i / 2 % 2].largest);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(row[h].sum);
        const int64_t place = int64_t{at.row(h)} * ceil_div(width, kStatisticColumns) + column / kStatisticColumns;
        if (threadIdx.x % 4 == 0 && at.local_row(h) < at.rows)
          st_global(out + place, make_float2(row[h].largest, sum));
      }
    }
  }
};

struct StoreLogits : StoreF32 {
  LogitStatistics statistics;

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Staging& staging) const {
    statistics.store<COLUMNS>(d, at, [&](const float* z, int first) { store_piece(z, at, first, staging); });
  }
};

struct MmaStoreLogits : MmaStoreF32 {
  LogitStatistics statistics;

  template <int COLUMNS>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, MmaStaging& staging) const {
    MmaStoreF32::store<COLUMNS>(d, at, staging);
    statistics.store<COLUMNS>(d, at, [](const float*, int) {});
  }
};

}  // namespace ROUTEGRAD_VARIANT
