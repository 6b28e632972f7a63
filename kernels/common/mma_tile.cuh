// The tile loop of every GEMM here on GPUs without wgmma (Ampere, Ada, Blackwell): persistent blocks of two warpgroups,
// which all load and all multiply. k-tiles of A and B come by cp.async into a ring of stages; a warp multiplies 16 rows of
// each of its warpgroup's boxes by 128 columns (mma.sync), and an epilogue takes the accumulators, as those of wgmma
// (gemm_tile.cuh). What the next tile is comes from gemm_schedule.cuh.
//
// At a step all threads issue the copies of a later k-tile into the stage that was read before, and multiply in pieces: 16 of
// the depth by half of the columns. A warp reads the fragments of a piece while it multiplies the piece before, also from one
// stage to the next: before the last piece of a stage, all threads wait for their own copies of the next one, and synchronize.
// Tensor cores would otherwise be idle while fragments come from shared memory. The warpgroups issue their copies at
// different times, so that one multiplies while the other computes addresses. The epilogue's buffers lie where the stages
// were. Warpgroup w takes boxes w, w + 2, …, so that both work on a tail; boxes without a valid row are neither loaded nor
// multiplied.
#pragma once
#include "gemm_epilogue.cuh"
#include "gemm_load.cuh"
#include "mma_fragment.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kMmaThreads = 256, kMmaColumns = 128;

struct MmaOperand {
  const bf16* data;          // [groups, height, width]
  const int32_t* row_index;  // the row of `data` for each row of the product; null: the same row
  int height, width;         // of a group's matrix
  bool per_group;            // else all groups share one
  int up_row;                // of W [E, 2F, D]: where up begins

  DEV const bf16* of_group(int group) const {
    return data + (per_group ? static_cast<int64_t>(group) * height * width : 0);
  }
};

// ROW_BLOCKS: products of 64 rows per warpgroup.
template <int ROW_BLOCKS, int STAGES, Major A_MAJOR, Major B_MAJOR, bool RAGGED_DEPTH, class EPILOGUE>
struct MmaTraits {
  using Epilogue = EPILOGUE;
  using Port = typename EPILOGUE::MmaPort;
  static constexpr int kRowBlocks = ROW_BLOCKS, kStages = STAGES;
  static constexpr Major kMajorA = A_MAJOR, kMajorB = B_MAJOR;
  static constexpr int kRows = ROW_BLOCKS * 128;
  static constexpr int kTileColumns = EPILOGUE::kGateUp ? kMmaColumns / 2 : kMmaColumns;
  using Schedule = std::conditional_t<RAGGED_DEPTH, RaggedK<kRows, kTileColumns>, RaggedM<kRows, kTileColumns>>;
  // Rows of an atom: a K-major operand is one atom, an MN-major one an atom per box.
  static constexpr int kAtomA = A_MAJOR == Major::K ? kRows : kGemmDepth;
  static constexpr int kAtomB = B_MAJOR == Major::K ? kMmaColumns : kGemmDepth;
};

template <class T>
union alignas(1024) MmaShared {
  struct {
    bf16 a[T::kStages][T::kRows * kGemmDepth], b[T::kStages][kMmaColumns * kGemmDepth];
  } stages;
  typename T::Port::Buffers port[2];  // of each warpgroup, once the stages are read
};

// The k-tile at depth k of a tile, each box by one warpgroup.
template <class T>
DEV void load_stage(MmaShared<T>& s, const MmaOperand& a, const MmaOperand& b, const Tile& tile, int k, int stage) {
  const int warpgroup = threadIdx.x / 128;
  for (int box = warpgroup; box * 64 < tile.rows; box += 2)
    copy_boxes<T::kMajorA>(s.stages.a[stage] + box * kBoxElements, a, 1, tile.row + 64 * box, tile.row + tile.rows, k,
                           tile.last_k);
  MmaOperand of_group = b;
  of_group.data = b.of_group(tile.group);
  const int first = T::Epilogue::kGateUp && warpgroup ? b.up_row + tile.column : tile.column + 64 * warpgroup;
  copy_boxes<T::kMajorB>(s.stages.b[stage] + warpgroup * kBoxElements, of_group, 1, first, b.height, k, tile.last_k);
}

constexpr int kMmaPieces = 4;  // of half a k-tile
static_assert(kGemmDepth == 2 * (kMmaPieces / 2) * 16);

// Fragments of two pieces: of A for each product of the warp, which two pieces share, and of B.
template <class T>
struct MmaPieces {
  uint32_t a[2][T::kRowBlocks][1][4], b[2][kMmaColumns / 32][4];
};

// A piece of half `half` of the k-tile in a stage.
template <class T, int BLOCKS>
DEV void load_piece(MmaPieces<T>& pieces, const MmaShared<T>& s, int stage, int half, int piece) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
  const int k = half * (kGemmDepth / 2) + piece / 2 * 16, side = piece % 2;
  load_fragments_b<T::kMajorB>(pieces.b[side], s.stages.b[stage], T::kAtomB, side * (kMmaColumns / 2), k);
  if (side) return;
#pragma unroll
  for (int i = 0; i < BLOCKS; ++i)
    load_fragment_a<T::kMajorA>(pieces.a[piece / 2 % 2][i], s.stages.a[stage], T::kAtomA,
                                (warpgroup + 2 * i) * 64 + warp * 16, k);
}

// d += A · B of a piece, for the products FIRST to BLOCKS of the warpgroup.
template <class T, int BLOCKS, int FIRST = 0>
DEV void multiply_piece(float (&d)[T::kRowBlocks][kMmaColumns / 2], const MmaPieces<T>& pieces, int piece) {
#pragma unroll
  for (int i = FIRST; i < BLOCKS; ++i)
    mma_row(d[i] + piece % 2 * (kMmaColumns / 4), pieces.a[piece / 2 % 2][i][0], pieces.b[piece % 2]);
}

// run(constant `blocks`), so that code for each number of products is free of branches; nothing for none.
template <int MOST, class Run>
DEV void with_blocks(int blocks, const Run& run) {
  if (blocks == MOST) run(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1) with_blocks<MOST - 1>(blocks, run);
}

template <class T>
__global__ void __launch_bounds__(kMmaThreads, 1)
    mma_gemm_kernel(const __grid_constant__ MmaOperand a, const __grid_constant__ MmaOperand b,
                    const __grid_constant__ typename T::Epilogue epilogue,
                    const __grid_constant__ typename T::Schedule schedule) {
  if constexpr (kCompilesAmpere) {
    DYNAMIC_SHARED(MmaShared<T>, s);
    const int warpgroup = threadIdx.x / 128;
    typename T::Schedule::Walk walk(schedule);
    typename T::Port port(s.port[warpgroup], warpgroup);
    Tile tile;
    while (walk.next(tile)) {
      const int steps = tile.depth_steps(), blocks = (ceil_div(tile.rows, 64) - warpgroup + 1) / 2;
      float d[T::kRowBlocks][kMmaColumns / 2];
#pragma unroll
      for (int i = 0; i < T::kRowBlocks; ++i)
#pragma unroll
        for (int j = 0; j < kMmaColumns / 2; ++j) d[i][j] = 0;
      const auto load = [&](int step, int stage) {
        if (step < steps) load_stage<T>(s, a, b, tile, tile.first_k + step * kGemmDepth, stage);
        cp_async_commit();  // also of nothing, so that waits can count
      };
      MmaPieces<T> pieces;
      const auto wait_for_stage = [&](int step) {
        if (step >= steps) return;
        cp_async_wait<T::kStages - 2>();
        __syncthreads();  // everybody's copies have landed, and the stage before is read
      };
#pragma unroll
      for (int step = 0; step < T::kStages - 1; ++step) load(step, step);
      wait_for_stage(0);
      with_blocks<T::kRowBlocks>(blocks, [&](auto n) {
        if (steps > 0) load_piece<T, decltype(n)::value>(pieces, s, 0, 0, 0);
      });
      for (int half = 0, step = 0, stage = 0; step < steps; half ^= 1) {
        if (half == warpgroup) load(step + T::kStages - 1, stage ? stage - 1 : T::kStages - 1);
        with_blocks<T::kRowBlocks>(blocks, [&](auto n) {
#pragma unroll
          for (int i = 0; i < kMmaPieces - 1; ++i) {
            load_piece<T, decltype(n)::value>(pieces, s, stage, half, i + 1);
            multiply_piece<T, decltype(n)::value>(d, pieces, i);
          }
        });
        if (half) {
          wait_for_stage(++step);
          stage = stage + 1 < T::kStages ? stage + 1 : 0;
        }
        with_blocks<T::kRowBlocks>(blocks, [&](auto n) {
          // One product first: it keeps the tensor cores busy while addresses are computed.
          multiply_piece<T, 1>(d, pieces, kMmaPieces - 1);
          if (step < steps) load_piece<T, decltype(n)::value>(pieces, s, stage, half ^ 1, 0);
          multiply_piece<T, decltype(n)::value, 1>(d, pieces, kMmaPieces - 1);
        });
      }
      cp_async_wait<0>();
      __syncthreads();  // the stages are read: buffers lie there now
#pragma unroll
      for (int i = 0; i < T::kRowBlocks; ++i)
        if (i < blocks) epilogue.template store<kMmaColumns>(d[i], Fragment(tile, warpgroup + 2 * i, false), port);
      __syncthreads();
    }
  }
}

}  // namespace ROUTEGRAD_VARIANT
