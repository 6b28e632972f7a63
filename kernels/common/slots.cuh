// Which rows and experts a token has, as dispatch.cu left it: slot s of token t has row slot_row[t, s] (−1: none) of
// expert choices[t, s], or of expert s where there is no list of choices. An expert is chosen when it has a row.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

struct TokenSlots {
  const int32_t* slot_row;  // [T, width]
  const int32_t* choices;   // [T, width], or null: width = E
  int width;                // slots of a token
  int experts;
  uint32_t rows;  // upper bound

  // −1 for none, and for a row that cannot be.
  DEV int row(int64_t token, int slot) const {
    const int row = ld_global_readonly(slot_row + token * width + slot);
    return static_cast<uint32_t>(row) < rows ? row : -1;
  }
  DEV int expert(int64_t token, int slot) const {
    return choices ? ld_global_readonly(choices + token * width + slot) : slot;
  }

  // Bit i: the token has a row of expert first + i. The four lanes of a quad ask for the same token and share the
  // slots; all lanes of the warp call it. Nothing is read for a token that is not there.
  DEV uint64_t chosen(int64_t token, bool there, int first) const {
    uint64_t bits = 0;
    const int begin = choices ? 0 : first, end = choices ? width : min(width, first + 64);
    for (int slot = begin + static_cast<int>(threadIdx.x % 4); there && slot < end; slot += 4) {
      const uint32_t i = static_cast<uint32_t>(expert(token, slot) - first);
      if (i < 64 && row(token, slot) >= 0) bits |= uint64_t{1} << i;
    }
    bits |= __shfl_xor_sync(~0u, bits, 1);
    return bits | __shfl_xor_sync(~0u, bits, 2);
  }
};

}  // namespace ROUTEGRAD_VARIANT
