// The router's products on GPUs without wgmma, with the tiles of router_tiles.cuh: blocks of two warpgroups, which all load
// and all multiply, a box of 64 rows each. x comes by cp.async one k-tile ahead; the f32 matrix comes through registers,
// where it is split into bf16 terms. With 256 experts shared memory holds one term: each k-tile then takes a round a term,
// which reads the matrix anew from L2.
#pragma once
#include "gemm_load.cuh"
#include "mma_fragment.cuh"
#include "router_tiles.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kRouterMmaThreads = 256;

// T: RouterTiles whose terms are those that shared memory holds at once.
template <class T>
struct alignas(1024) RouterMmaStages {
  bf16 x[2][2 * kRouterBox];
  bf16 terms[T::kTerms][T::kElements];
};

struct RouterRows {  // x, as copy_boxes reads it
  const bf16* data;  // [tokens, width]
  const int32_t* row_index;
  int width, tokens;
};

// COUNT chunks of 8 values of a tile of the f32 matrix, a thread, from its chunk number `first` on.
template <class T, int COUNT>
struct MatrixChunks {
  float v[COUNT][8] = {};

  static DEV int row(int j) { return (static_cast<int>(threadIdx.x) + j * kRouterMmaThreads) / (T::kColumns / 8); }
  static DEV int chunk() { return threadIdx.x % (T::kColumns / 8); }

  DEV void load(const F32Matrix& m, int first_row, int first_column, int first = 0) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      if (row(first + j) < T::kRows)
        load_eight<T::kMajor == Major::K>(v[j], m, first_row + row(first + j), first_column + 8 * chunk());
  }
  // Stores the terms after the first `skipped`.
  DEV void store(bf16 (&terms)[T::kTerms][T::kElements], int skipped = 0, int first = 0) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      if (row(first + j) >= T::kRows) break;
      for (int term = 0; term < skipped; ++term)
#pragma unroll
        for (int i = 0; i < 8; i += 2) take_term(v[j][i], v[j][i + 1]);
      store_terms<T>(terms, v[j], row(first + j), chunk());
    }
  }
};

// A tile of the f32 matrix on its way: with up to 128 experts in registers, loaded while the tile before is multiplied;
// with 256 there are no registers left, and it is loaded when it is stored.
template <class T>
struct MatrixTile {
  static constexpr int kAll = (T::kRows * T::kColumns / 8 + kRouterMmaThreads - 1) / kRouterMmaThreads;
  static constexpr bool kAhead = T::kExperts <= 128;
  static constexpr int kBatch = kAhead ? kAll : 2;
  MatrixChunks<T, kBatch> chunks;

  DEV void fetch(const F32Matrix& m, int first_row, int first_column) {
    if constexpr (kAhead) chunks.load(m, first_row, first_column);
  }
  DEV void store(bf16 (&terms)[T::kTerms][T::kElements], int skipped, const F32Matrix& m, int first_row,
                 int first_column) {
#pragma unroll 1
    for (int first = 0; first < kAll; first += kBatch) {
      if constexpr (!kAhead) chunks.load(m, first_row, first_column, first);
      chunks.store(terms, skipped, first);
    }
  }
};

// d += the warpgroup's box of x times the terms.
template <class T>
DEV void multiply_terms(float (&d)[T::kExperts / 2], const bf16* x, const bf16 (&terms)[T::kTerms][T::kElements]) {
  constexpr int kPiece = T::kExperts < 64 ? T::kExperts : 64;  // experts whose fragments are held at once
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < kRouterDepth; k += 16) {
    uint32_t a[1][4];
    load_fragment_a<T::kMajor>(a, x + warpgroup * kRouterBox, 64, 16 * warp, k);
#pragma unroll
    for (int term = 0; term < T::kTerms; ++term)
#pragma unroll
      for (int first = 0; first < T::kExperts; first += kPiece) {
        uint32_t b[kPiece / 16][4];
        load_fragments_b<T::kMajor>(b, terms[term], T::kRows, first, k);
        mma_row(d + first / 2, a[0], b);
      }
  }
}

// d[64, EXPERTS] = the warpgroup's box of x times the matrix, over `steps` k-tiles, in ROUNDS of T::kTerms terms.
template <class T, int ROUNDS>
DEV void multiply_router(RouterMmaStages<T>& s, float (&d)[T::kExperts / 2], const RouterRows& x, const F32Matrix& m,
                         const RouterOrigin& origin, int steps) {
  constexpr bool kAlongTokens = T::kMajor == Major::MN;
  const int warpgroup = threadIdx.x / 128;
  const auto load_x = [&](int i) {
    const int moved = i * kRouterDepth;
    if (i < steps)
      copy_boxes<T::kMajor>(s.x[i % 2] + warpgroup * kRouterBox, x, 1,
                            (kAlongTokens ? origin.column : origin.token) + 64 * warpgroup, x.tokens,
                            (kAlongTokens ? origin.token : origin.column) + moved, x.tokens);
    cp_async_commit();
  };
  const auto row_of = [&](int i) { return kAlongTokens ? origin.token + i * kRouterDepth : 0; };
  const auto column_of = [&](int i) { return kAlongTokens ? 0 : origin.column + i * kRouterDepth; };
#pragma unroll
  for (int i = 0; i < T::kExperts / 2; ++i) d[i] = 0;
  MatrixTile<T> tile;
  load_x(0);
  tile.fetch(m, row_of(0), column_of(0));
  for (int i = 0; i < steps; ++i) {
#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
      __syncthreads();  // what was multiplied last is read
      if (round == 0) load_x(i + 1);
      tile.store(s.terms, round * T::kTerms, m, row_of(i), column_of(i));
      if (round == 0) cp_async_wait<1>();
      __syncthreads();
      if (i + 1 < steps) tile.fetch(m, row_of(i + 1), column_of(i + 1));
      multiply_terms<T>(d, s.x[i % 2], s.terms);
    }
  }
  cp_async_wait<0>();
}

}  // namespace ROUTEGRAD_VARIANT
