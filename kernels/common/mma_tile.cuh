// The tile loop of every GEMM here on GPUs without wgmma (Ampere, Ada, Blackwell): persistent blocks of two warpgroups,
// which all load and all multiply. k-tiles of A and B come by cp.async into a ring of stages; a warp multiplies 16 rows of
// each of its warpgroup's boxes by 128 columns (mma.sync), and an epilogue takes the accumulators, as those of wgmma
// (gemm_tile.cuh). What the next tile is comes from gemm_schedule.cuh.
//
// At a step all threads wait for the stage's copies of their own, meet, issue the copies of a later k-tile into the stage
// that was multiplied last, and multiply. The epilogue's buffers lie where the stages were. Warpgroup w takes boxes
// w, w + 2, …, so that both work on a tail; boxes without a valid row are neither loaded nor multiplied.
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

// d += A · B of a k-tile, for the first `blocks` products of the warpgroup.
template <class T>
DEV void multiply_stage(const MmaShared<T>& s, float (&d)[T::kRowBlocks][kMmaColumns / 2], int stage, int blocks) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < kGemmDepth; k += 16) {
    uint32_t b[kMmaColumns / 16][4];
    load_fragments_b<T::kMajorB>(b, s.stages.b[stage], T::kAtomB, 0, k);
#pragma unroll
    for (int i = 0; i < T::kRowBlocks; ++i) {
      if (i >= blocks) break;
      uint32_t a[1][4];
      load_fragment_a<T::kMajorA>(a, s.stages.a[stage], T::kAtomA, (warpgroup + 2 * i) * 64 + warp * 16, k);
      mma_row(d[i], a[0], b);
    }
  }
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
      const auto load = [&](int step) {
        if (step < steps) load_stage<T>(s, a, b, tile, tile.first_k + step * kGemmDepth, step % T::kStages);
        cp_async_commit();  // also of nothing, so that waits can count
      };
#pragma unroll
      for (int step = 0; step < T::kStages - 1; ++step) load(step);
      for (int step = 0; step < steps; ++step) {
        cp_async_wait<T::kStages - 2>();
        __syncthreads();  // everybody's copies have landed, and the stage before is read
        load(step + T::kStages - 1);
        multiply_stage<T>(s, d, step % T::kStages, blocks);
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
