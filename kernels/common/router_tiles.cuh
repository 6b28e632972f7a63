// What the router's products share: a ring of stages that holds x (bf16, exact) beside an f32 matrix as bf16 terms.
//
// A tensor core multiplies bf16. The f32 matrix (the router weight W, or dz) is therefore split on its way into shared
// memory: v = t0 + t1 + t2, each term the bf16 nearest to what the earlier ones leave. Three terms of 8 bits carry all 24
// of an f32 (while t2 is a normal number, |v| > 2^-100 or so), two of them 16. Products with x are exact in f32, so three
// terms give the accuracy of an f32 product.
//
// Blocks of three warpgroups, one tile each. Warpgroup 0 loads: boxes of 64 x 64 of x by TMA, and 64 rows or columns of
// the matrix through registers. Warpgroups 1 and 2 multiply, one box each. Stage i of the ring is full when the boxes'
// bytes and the four loading warps have arrived, empty when the eight multiplying warps have.
#pragma once
#include <type_traits>

#include "bf16_terms.cuh"
#include "ptx.cuh"
#include "ring.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kRouterThreads = 384;
constexpr int kRouterDepth = 64;   // rows or columns of a k-tile: one 128-byte swizzle span of bf16
constexpr int kRouterTokens = 128; // of a block that owns tokens: 64 a multiplying warpgroup
constexpr int kRouterBox = 64 * 64;  // elements
constexpr int kRouterMaxExperts = 256;
constexpr int64_t kRouterMaxTokens = INT32_MAX - 4096;  // so that a row past the last tile is still an int
constexpr int kRouterMaxHidden = 1 << 24;

// EXPERTS is padded to 16, 32, 64, 128 or 256. MAJOR says what the reduction runs over:
//   K   the hidden dimension: x tile [2 x 64 tokens, 64 of D], matrix tile W[EXPERTS, 64 of D]; dW's other way round is
//   MN  tokens: x tile [64 tokens, 2 x 64 of D], matrix tile dz[64 tokens, EXPERTS]
// BLOCKS of a kernel share a multiprocessor: two, where they fit, so that one multiplies while the other starts or ends.
template <int EXPERTS, int TERMS, Major MAJOR, int STAGES, int BLOCKS>
struct RouterTiles {
  static constexpr int kExperts = EXPERTS, kTerms = TERMS, kStages = STAGES;
  static constexpr Major kMajor = MAJOR;
  static constexpr int kRows = MAJOR == Major::K ? EXPERTS : kRouterDepth;     // of the matrix tile
  static constexpr int kColumns = MAJOR == Major::K ? kRouterDepth : EXPERTS;
  static constexpr int kAtoms = (kColumns + 63) / 64;
  static constexpr int kElements = kRows * kAtoms * 64;  // of one term in shared memory
  static constexpr int kBlocksPerSm = BLOCKS;
};

template <class T>
struct alignas(1024) RouterStages {
  bf16 x[T::kStages][2 * kRouterBox];
  bf16 terms[T::kStages][T::kTerms][T::kElements];  // atoms of kRows rows of 64, chunks of 16 bytes XORed by the row
  uint64_t full[T::kStages], empty[T::kStages];
};

template <class T>
using Step = RingStep<T::kStages, int>;

template <class T>
DEV void init_stages(RouterStages<T>& s) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbar_init(&s.full[stage], 5);
      mbar_init(&s.empty[stage], 8);
    }
    fence_mbar_init();
  }
  __syncthreads();
}

// ---- loading
struct F32Matrix {
  const float* data;  // [height, width]
  int height, width;
};

// Columns column … column + 7 of a row, zero outside of the matrix. WHOLE: its width is a multiple of 8.
template <bool WHOLE>
DEV void load_eight(float (&v)[8], const F32Matrix& m, int row, int column) {
  const float* source = m.data + static_cast<int64_t>(row) * m.width + column;
  if (WHOLE && (row >= m.height || column >= m.width)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0;
  } else if (WHOLE || (row < m.height && m.width % 4 == 0 && column + 8 <= m.width)) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = ld_global_readonly(reinterpret_cast<const float4*>(source + i));
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = row < m.height && column + i < m.width ? ld_global_readonly(source + i) : 0.0f;
  }
}

template <class T>
DEV void store_terms(bf16 (&terms)[T::kTerms][T::kElements], float (&v)[8], int row, int chunk) {
  uint8_t* to = reinterpret_cast<uint8_t*>(terms) + chunk / 8 * T::kRows * 128 + row * 128 + (chunk % 8 ^ (row & 7)) * 16;
#pragma unroll
  for (int term = 0; term < T::kTerms; ++term) {
    uint4 packed;
    packed.x = take_term(v[0], v[1]);
    packed.y = take_term(v[2], v[3]);
    packed.z = take_term(v[4], v[5]);
    packed.w = take_term(v[6], v[7]);
    *reinterpret_cast<uint4*>(to + term * T::kElements * 2) = packed;
  }
}

// Where a block's first k-tile begins.
struct RouterOrigin {
  int token, column;
};

// Warpgroup 0: fills `steps` stages. x is not loaded where `x` is null.
template <class T>
DEV void load_stages(RouterStages<T>& s, const TensorMap* x, const F32Matrix& m, const RouterOrigin& origin, int steps) {
  constexpr bool kAlongTokens = T::kMajor == Major::MN;
  constexpr int kChunks = T::kRows * T::kColumns / 8 / 128;  // of 8 values, a thread and stage
  constexpr int kBatch = kChunks < 4 ? kChunks : 4;          // under way at once: more would not fit the registers
  // A thread loads one chunk of 8 columns of every kRowsApart-th row.
  constexpr int kRowsApart = 128 * 8 / T::kColumns;
  const int my_row = static_cast<int>(threadIdx.x) / (T::kColumns / 8), my_chunk = threadIdx.x % (T::kColumns / 8);
  if (x && threadIdx.x == 0) tma_prefetch(x);
  for (int i = 0; i < steps; ++i) {
    const Step<T> at(i);
    const int token = origin.token + (kAlongTokens ? i * kRouterDepth : 0);
    const int column = origin.column + (kAlongTokens ? 0 : i * kRouterDepth);
    if (threadIdx.x == 0) {
      mbar_wait(&s.empty[at.stage], at.parity ^ 1);
      mbar_expect_tx(&s.full[at.stage], x ? 2 * kRouterBox * 2 : 0);
      for (int box = 0; x && box < 2; ++box)
        tma_load_3d(s.x[at.stage] + box * kRouterBox, x, &s.full[at.stage], column + (kAlongTokens ? 64 * box : 0),
                    token + (kAlongTokens ? 0 : 64 * box), 0);
    }
#pragma unroll 1
    for (int batch = 0; batch < kChunks; batch += kBatch) {
      float v[kBatch][8];
      const int first_row = my_row + batch * kRowsApart;
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        load_eight<!kAlongTokens>(v[j], m, first_row + j * kRowsApart + (kAlongTokens ? token : 0),
                                  my_chunk * 8 + (kAlongTokens ? 0 : column));
      if (batch == 0) mbar_wait(&s.empty[at.stage], at.parity ^ 1);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) store_terms<T>(s.terms[at.stage], v[j], first_row + j * kRowsApart, my_chunk);
    }
    fence_proxy_async();
    __syncwarp();  // lane 0 speaks for lanes that have written
    if (threadIdx.x % 32 == 0) mbar_arrive(&s.full[at.stage]);
  }
}

// ---- multiplying
// d[64, EXPERTS] = the warpgroup's box of x times the matrix, over `steps` stages. The box is [64 tokens, 64 of D]; with
// MAJOR = MN its transpose multiplies.
template <class T>
DEV void multiply_stages(RouterStages<T>& s, float (&d)[T::kExperts / 2], int steps) {
  const int box = threadIdx.x / 128 - 1;
  pin_registers(d);
  for (int i = 0; i < steps; ++i) {
    const Step<T> at(i);
    mbar_wait(&s.full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kRouterDepth / 16; ++k16) {
      const uint64_t a = wgmma_descriptor<T::kMajor>(s.x[at.stage] + box * kRouterBox, k16, 64, kRouterDepth);
#pragma unroll
      for (int term = 0; term < T::kTerms; ++term)
        wgmma<T::kExperts, T::kMajor, T::kMajor>(
            d, a, wgmma_descriptor<T::kMajor>(s.terms[at.stage][term], k16, T::kExperts, kRouterDepth),
            i > 0 || k16 > 0 || term > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the stage before is read: it may be loaded again
    if (i > 0 && threadIdx.x % 32 == 0) mbar_arrive(&s.empty[Step<T>(i - 1).stage]);
  }
  wgmma_wait<0>(d);
}

// ---- host side
// A [rows, columns] bf16 matrix in boxes of 64 x 64.
inline routegrad_status router_map(TensorMap* map, const void* base, int64_t rows, int64_t columns) {
  const auto width = static_cast<uint64_t>(columns), height = static_cast<uint64_t>(rows);
  return make_tensor_map<3>(
      map, {base, Element::Bf16, {width, height, 1}, {width * 2, width * height * 2}, {64, 64, 1}, Swizzle::Span128});
}

// Calls body(integral_constant of the padded number of experts).
template <class Body>
routegrad_status with_padded_experts(int experts, Body body) {
  if (experts <= 16) return body(std::integral_constant<int, 16>{});
  if (experts <= 32) return body(std::integral_constant<int, 32>{});
  if (experts <= 64) return body(std::integral_constant<int, 64>{});
  if (experts <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

}  // namespace ROUTEGRAD_VARIANT
