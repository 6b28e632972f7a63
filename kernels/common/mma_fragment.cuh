// Operand fragments of mma.sync, from tiles in shared memory as every loader here lays them down: atoms of `rows` rows by
// 64 bf16, 128 bytes a row, chunks of 16 bytes XORed by the row; atoms follow each other along the columns. The eight rows
// that ldmatrix reads at once are neighbours, so that they never share a bank.
//   K-major   rows are m (A) or n (B), columns are k
//   MN-major  rows are k, columns are m or n: ldmatrix transposes
#pragma once
#include "ptx.cuh"

namespace ROUTEGRAD_VARIANT {

DEV const uint8_t* swizzled_chunk(const bf16* tile, int rows, int row, int chunk) {
  return reinterpret_cast<const uint8_t*>(tile) + chunk / 8 * rows * 128 + row * 128 + (chunk % 8 ^ (row & 7)) * 16;
}

// A [16, 16] from row m and depth k on, both multiples of 16.
template <Major MAJOR>
DEV void load_fragment_a(uint32_t (&a)[1][4], const bf16* tile, int rows, int m, int k,
                         Where at = Where::current()) {
  const int lane = threadIdx.x % 32;
  ldmatrix_rows<MAJOR == Major::MN>(
      a,
      [&](int) {
        return MAJOR == Major::K ? swizzled_chunk(tile, rows, m + lane % 16, k / 8 + lane / 16)
                                 : swizzled_chunk(tile, rows, k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2);
      },
      at);
}

// B [16, 16 PAIRS] from column n and depth k on, both multiples of 16.
template <Major MAJOR, int PAIRS>
DEV void load_fragments_b(uint32_t (&b)[PAIRS][4], const bf16* tile, int rows, int n, int k,
                          Where at = Where::current()) {
  const int lane = threadIdx.x % 32;
  ldmatrix_rows<MAJOR == Major::MN>(
      b,
      [&](int j) {
        return MAJOR == Major::K
                   ? swizzled_chunk(tile, rows, n + 16 * j + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2)
                   : swizzled_chunk(tile, rows, k + lane % 16, n / 8 + 2 * j + lane / 16);
      },
      at);
}

}  // namespace ROUTEGRAD_VARIANT
