// Matrix products of a warp on every NVIDIA GPU from Ampere on: D[16, 8] f32 += A[16, 16] bf16 · B[16, 8] bf16, from
// registers to registers, with the operands' fragments read by ldmatrix.
//
// Accumulators of a row of products: lane l holds, in d[4 j + 2 h + e], row l / 4 + 8 h and column 8 j + 2 (l mod 4) + e:
// the fragment that a warp of a warpgroup has of wgmma's 64 rows (ptx_wgmma.cuh), so that what follows a product is the
// same code.
#pragma once
#include "ptx_sync.cuh"

namespace ROUTEGRAD_VARIANT {

// COUNT times ldmatrix (ptx_copy.cuh): r[i] from the rows that address(i) names. One call, since the simulator's lanes meet
// once for all.
template <bool TRANSPOSE, int COUNT, class Address>
DEV void ldmatrix_rows(uint32_t (&r)[COUNT][4], const Address& address, [[maybe_unused]] Where at = Where::current()) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const uint32_t row = shared_address(address(i));
    if constexpr (TRANSPOSE)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[i][0]), "=r"(r[i][1]), "=r"(r[i][2]), "=r"(r[i][3])
                   : "r"(row)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[i][0]), "=r"(r[i][1]), "=r"(r[i][2]), "=r"(r[i][3])
                   : "r"(row)
                   : "memory");
  }
#else
  uint32_t rows[COUNT];
  for (int i = 0; i < COUNT; ++i) rows[i] = shared_address(address(i), at);
  sim::ldmatrix(r[0], rows, COUNT, TRANSPOSE, at);
#endif
}

// d[16, 16 PAIRS], 8 PAIRS floats a lane, += a · b. a[2 kh + h]: row l / 4 + 8 h, columns 2 (l mod 4) + 8 kh (low half) and the next of A;
// b[j][2 e + kh]: rows 2 (l mod 4) + 8 kh and the next of B, column 16 j + 8 e + l / 4.
template <int PAIRS>
DEV void mma_row(float* d, const uint32_t (&a)[4], const uint32_t (&b)[PAIRS][4],
                 [[maybe_unused]] Where at = Where::current()) {
#ifdef __CUDACC__
#pragma unroll
  for (int j = 0; j < 2 * PAIRS; ++j)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[4 * j]), "+f"(d[4 * j + 1]), "+f"(d[4 * j + 2]), "+f"(d[4 * j + 3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[j / 2][j % 2 * 2]), "r"(b[j / 2][j % 2 * 2 + 1]));
#else
  sim::mma_row(d, a, b[0], 2 * PAIRS, at);
#endif
}

}  // namespace ROUTEGRAD_VARIANT
