// The arithmetic of one wgmma, or of a row of mma, for the widest vectors that the processor has; chosen at run time, so that one build
// serves all. Every variant adds the 16 terms of k in order, each by one fused multiply-add where there is one.
#include <cstdlib>

#include "machine.hpp"

namespace sim {

// acc[columns][ROWS] += a[16][ROWS] · b[columns][16], in register tiles of J columns and RB vectors of W floats.
template <int ROWS, int W, int RB, int J>
static inline __attribute__((always_inline)) void multiply(float* acc, const float* a, const float* b, int columns) {
  typedef float Vector __attribute__((vector_size(4 * W)));
  for (int c = 0; c < columns; c += J)
    for (int r = 0; r < ROWS; r += RB * W) {
      Vector sum[J][RB];
      for (int j = 0; j < J; ++j)
        for (int i = 0; i < RB; ++i) sum[j][i] = *reinterpret_cast<Vector*>(acc + (c + j) * ROWS + r + W * i);
      for (int k = 0; k < 16; ++k) {
        Vector column[RB];
        for (int i = 0; i < RB; ++i) column[i] = *reinterpret_cast<const Vector*>(a + k * ROWS + r + W * i);
        for (int j = 0; j < J; ++j)
          for (int i = 0; i < RB; ++i) sum[j][i] += column[i] * b[(c + j) * 16 + k];
      }
      for (int j = 0; j < J; ++j)
        for (int i = 0; i < RB; ++i) *reinterpret_cast<Vector*>(acc + (c + j) * ROWS + r + W * i) = sum[j][i];
    }
}

template <int ROWS>
__attribute__((target("avx512f"))) static void multiply_avx512(float* acc, const float* a, const float* b, int columns) {
  multiply<ROWS, 16, ROWS / 16, 4>(acc, a, b, columns);
}
template <int ROWS>
__attribute__((target("avx2,fma"))) static void multiply_avx2(float* acc, const float* a, const float* b, int columns) {
  multiply<ROWS, 8, 2, 4>(acc, a, b, columns);
}
template <int ROWS>
static void multiply_sse2(float* acc, const float* a, const float* b, int columns) {
  multiply<ROWS, 4, 2, 4>(acc, a, b, columns);
}

template <int ROWS>
static ProductKernel widest() {
  if (__builtin_cpu_supports("avx512f")) return multiply_avx512<ROWS>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2<ROWS>;
  return multiply_sse2<ROWS>;
}
ProductKernel product_kernel(int rows) { return rows == 16 ? widest<16>() : widest<64>(); }

}  // namespace sim
