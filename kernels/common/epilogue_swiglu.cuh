// Epilogue of the gate and up projection: h = bf16(d), and a = bf16(silu(gate) ⊙ up) from the f32 sums, both assigned.
// A tile's left half is gate, its right half the same columns of up, so that a thread holds both of every pair.
#pragma once
#include "epilogue_store_bf16.cuh"
#include "swiglu.cuh"

namespace ROUTEGRAD_VARIANT {

struct StoreSwiglu : PlainEpilogue {
  static constexpr bool kGateUp = true;
  Bf16Output h;  // [R, 2, F]
  Bf16Output a;  // [R, F]

  template <int COLUMNS, int FIRST = 0, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& staging) const {
    constexpr int kHalf = COLUMNS / 2, kPiece = piece_columns(kHalf, FIRST);
    const int column = at.first_column + FIRST;
    if (column >= a.width) return;
    const float *gate = d + FIRST / 2, *up = d + kHalf / 2 + FIRST / 2;
    const auto pairs_of = [](const float* v) {
      return [v](int j, int h) { return pack_bf16(v[4 * j + 2 * h], v[4 * j + 2 * h + 1]); };
    };
    h.store<kPiece>(at, column, 0, staging, pairs_of(gate));
    h.store<kPiece>(at, column, 1, staging, pairs_of(up));
    a.store<kPiece>(at, column, 0, staging, [&](int j, int h) {
      const int i = 4 * j + 2 * h;
      return pack_bf16(gate[i] * sigmoid(gate[i]) * up[i], gate[i + 1] * sigmoid(gate[i + 1]) * up[i + 1]);
    });
    if constexpr (FIRST + 64 < kHalf) store<COLUMNS, FIRST + 64>(d, at, staging);
  }
};

}  // namespace ROUTEGRAD_VARIANT
