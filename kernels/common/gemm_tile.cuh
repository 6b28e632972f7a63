// The tile loop of every GEMM here: persistent blocks of three warpgroups on Hopper. Warpgroup 0 loads k-tiles of A and
// B into a ring of stages; warpgroups 1 and 2 multiply (wgmma, f32 accumulators in registers) and hand each tile to an
// epilogue. What the next tile is comes from gemm_schedule.cuh; what becomes of the result is the epilogue's matter
// (gemm_epilogue.cuh says how to write one).
//
// A stage is full when its bytes have arrived (and, with cp.async, all four producer warps have), empty when every
// consumer warp that reads it has finished. Cooperative: the warpgroups take the upper and lower half of one tile.
// Pingpong: they take tiles in turn, so that one stores while the other multiplies; a pair of named barriers keeps the
// turns. Boxes of 64 rows that lie wholly past the last row of a tile are not loaded.
#pragma once
#include "gemm_epilogue.cuh"
#include "gemm_load.cuh"
#include "ring.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kGemmThreads = 384;
constexpr int kOrderBarrier = 3;  // 3 and 4: whose turn it is; 1 and 2 belong to the epilogues

// How A comes: through TMA, or gathered by cp.async; in a ragged reduction also B.
enum class Gather { None, A, B };

// ROW_BLOCKS: products of 64 rows per consumer warpgroup.
template <int ROW_BLOCKS, int COLUMNS, bool PINGPONG, int STAGES, Major A_MAJOR, Major B_MAJOR, bool RAGGED_DEPTH,
          Gather GATHER, class EPILOGUE>
struct GemmTraits {
  using Epilogue = EPILOGUE;
  using Port = typename EPILOGUE::Port;
  static constexpr int kRowBlocks = ROW_BLOCKS, kColumns = COLUMNS, kStages = STAGES;
  static constexpr bool kPingpong = PINGPONG;
  static constexpr Major kMajorA = A_MAJOR, kMajorB = B_MAJOR;
  static constexpr Gather kGather = GATHER;
  static constexpr int kBoxesA = ROW_BLOCKS * (PINGPONG ? 1 : 2), kRows = kBoxesA * 64;
  // An MN-major B of 176 columns is loaded as three boxes, 192 columns wide, and used in part.
  static constexpr int kLoadedColumns = B_MAJOR == Major::MN ? (COLUMNS + 63) / 64 * 64 : COLUMNS;
  static constexpr int kBoxesB = (kLoadedColumns + 63) / 64;
  // Without cp.async one thread issues everything. A ragged reduction ends inside a k-tile, which cp.async fills.
  static constexpr bool kCopies = RAGGED_DEPTH || GATHER != Gather::None;
  // Stages whose copies are still under way when the next stage's are issued. One stage must be left for the consumer
  // to finish and one to multiply, or the ring stands still.
  static constexpr int kCopyLag = GATHER == Gather::None ? 0 : STAGES - 2;
  static constexpr int kFullArrivals = 1 + (kCopies ? 4 : 0);
  static constexpr int kEmptyArrivals = PINGPONG ? 4 : 8;
  // A tail of 64 rows is multiplied alone, unless the code for both cases would not fit the registers (ptxas 13.0
  // spills): at 176 columns, and before an epilogue that reads.
  static constexpr bool kHalfTail = ROW_BLOCKS == 2 && COLUMNS <= 128 && !EPILOGUE::kPrefetch;
  // Registers a thread; producer + 2 consumer = 3 · 168.
  static constexpr int kProducerRegisters = !kCopies ? 24 : kHalfTail || EPILOGUE::kPrefetch ? 40 : 56;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static constexpr int kTileColumns = EPILOGUE::kGateUp ? COLUMNS / 2 : COLUMNS;
  using Schedule = std::conditional_t<RAGGED_DEPTH, RaggedK<kRows, kTileColumns>, RaggedM<kRows, kTileColumns>>;
};

template <class T>
struct alignas(1024) GemmShared {
  bf16 a[T::kStages][T::kRows * kGemmDepth];
  bf16 b[T::kStages][T::kLoadedColumns * kGemmDepth];
  typename T::Port::Buffers port[2];  // of each consumer warpgroup
  uint64_t full[T::kStages], empty[T::kStages], port_full[2][4];  // the last for ports that load
};

// ---- producer, everything by TMA: one thread.
template <class T>
DEV void load_a_tma(GemmShared<T>& s, const GemmOperand& a, const Tile& tile, int boxes, int k, int stage) {
  for (int box = 0; box < boxes; ++box) {
    const BoxPlace place = box_place<T::kMajorA>(tile.row, box, k);
    tma_load_3d(s.a[stage] + box * kBoxElements, &a.map, &s.full[stage], place.column, place.row, 0);
  }
}
// A K-major B is one box of all its rows, or one of gate and one of up. B is a weight of its own per group unless the
// reduction is ragged.
template <class T>
DEV void load_b_tma(GemmShared<T>& s, const GemmOperand& b, const Tile& tile, int group, int k, int stage) {
  if constexpr (T::kMajorB == Major::K) {
    tma_load_3d(s.b[stage], &b.map, &s.full[stage], k, tile.column, group);
    if constexpr (T::Epilogue::kGateUp)
      tma_load_3d(s.b[stage] + T::kTileColumns * kGemmDepth, &b.map, &s.full[stage], k, b.up_row + tile.column, group);
  } else {
#pragma unroll
    for (int box = 0; box < T::kBoxesB; ++box)
      tma_load_3d(s.b[stage] + box * kBoxElements, &b.map, &s.full[stage], tile.column + 64 * box, k, group);
  }
}

template <class T>
DEV void produce_by_tma(GemmShared<T>& s, const GemmOperand& a, const GemmOperand& b,
                        const typename T::Schedule& schedule) {
  typename T::Schedule::Walk walk(schedule);
  Ring<T::kStages> ring;
  Tile tile;
  tma_prefetch(&a.map);
  tma_prefetch(&b.map);
  while (walk.next(tile)) {
    const int boxes = ceil_div(tile.rows, 64);
    for (int k = tile.first_k; k < tile.last_k; k += kGemmDepth, ring.advance()) {
      mbar_wait(&s.empty[ring.stage], ring.parity ^ 1);
      mbar_expect_tx(&s.full[ring.stage], boxes * kBoxBytes + T::kLoadedColumns * kGemmDepth * 2);
      load_a_tma<T>(s, a, tile, boxes, k, ring.stage);
      load_b_tma<T>(s, b, tile, tile.group, k, ring.stage);
    }
  }
}

// ---- producer with cp.async: four warps. A gathered operand is copied; so are both in the last, partial k-tile of a
// ragged reduction. Thread 0 loads the rest by TMA.
template <class T>
DEV void produce_with_copies(GemmShared<T>& s, const GemmOperand& a, const GemmOperand& b,
                             const typename T::Schedule& schedule) {
  constexpr bool kRaggedDepth = T::Schedule::kRaggedDepth;
  typename T::Schedule::Walk walk(schedule);
  Ring<T::kStages> ring, done;
  Tile tile;
  int under_way = 0;
  // The oldest stage's copies of this thread have landed: publish them to the tensor cores, warp by warp.
  const auto signal = [&] {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbar_arrive(&s.full[done.stage]);
    done.advance();
  };
  while (walk.next(tile)) {
    const int boxes = ceil_div(tile.rows, 64);
    for (int k = tile.first_k; k < tile.last_k; k += kGemmDepth, ring.advance()) {
      const bool partial = kRaggedDepth && k + kGemmDepth > tile.last_k;
      const bool copy_a = T::kGather == Gather::A || partial, copy_b = T::kGather == Gather::B || partial;
      mbar_wait(&s.empty[ring.stage], ring.parity ^ 1);
      if (threadIdx.x == 0) {
        mbar_expect_tx(&s.full[ring.stage],
                       (copy_a ? 0 : boxes * kBoxBytes) + (copy_b ? 0 : T::kLoadedColumns * kGemmDepth * 2));
        if (!copy_a) load_a_tma<T>(s, a, tile, boxes, k, ring.stage);
        if (!copy_b) load_b_tma<T>(s, b, tile, kRaggedDepth ? 0 : tile.group, k, ring.stage);
      }
      if (copy_a) copy_boxes<T::kMajorA>(s.a[ring.stage], a, boxes, tile.row, tile.row + tile.rows, k, tile.last_k);
      if (copy_b) copy_boxes<T::kMajorB>(s.b[ring.stage], b, T::kBoxesB, tile.column, 0, k, tile.last_k);
      cp_async_commit();
      if (under_way == T::kCopyLag) {
        cp_async_wait<T::kCopyLag>();
        signal();
      } else {
        ++under_way;
      }
    }
  }
  cp_async_wait<0>();
  while (under_way--) signal();
}

// ---- consumer
// d = A · B over the k-tiles of a tile, for BLOCKS products of 64 rows from box `first_box` of A.
template <class T, int BLOCKS>
DEV void multiply(GemmShared<T>& s, float (&d)[BLOCKS][T::kColumns / 2], Ring<T::kStages>& ring, int steps,
                  int first_box) {
  int previous = 0;
#pragma unroll
  for (int i = 0; i < BLOCKS; ++i) pin_registers(d[i]);
  for (int step = 0; step < steps; ++step, ring.advance()) {
    mbar_wait(&s.full[ring.stage], ring.parity);
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kGemmDepth / 16; ++k16) {
      const uint64_t b = wgmma_descriptor<T::kMajorB>(s.b[ring.stage], k16, T::kColumns, kGemmDepth);
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) {
        const uint64_t a =
            wgmma_descriptor<T::kMajorA>(s.a[ring.stage] + (first_box + i) * kBoxElements, k16, 64, kGemmDepth);
        wgmma<T::kColumns, T::kMajorA, T::kMajorB>(d[i], a, b, step > 0 || k16 > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // the previous k-tile is done: its stage may be loaded again
    if (step > 0 && threadIdx.x % 32 == 0) mbar_arrive(&s.empty[previous]);
    previous = ring.stage;
  }
  wgmma_wait<0>(d);
  if (threadIdx.x % 32 == 0) mbar_arrive(&s.empty[previous]);
}

// Pingpong: a warpgroup multiplies only in its turn. Barrier kOrderBarrier + w says that the other has finished.
template <class T>
DEV void begin_turn(int warpgroup) {
  if constexpr (T::kPingpong) named_bar_sync(kOrderBarrier + warpgroup, 256);
}
template <class T>
DEV void end_turn(int warpgroup) {
  if constexpr (T::kPingpong) named_bar_arrive(kOrderBarrier + (warpgroup ^ 1), 256);
}

template <class T, int BLOCKS>
DEV void consume_tile(GemmShared<T>& s, const typename T::Epilogue& epilogue, const Tile& tile, Ring<T::kStages>& ring,
                      typename T::Port& port, int warpgroup, int first_box, int row_blocks) {
  float d[BLOCKS][T::kColumns / 2];
  const int steps = tile.depth_steps();
  if constexpr (T::Epilogue::kPrefetch)
    epilogue.template prefetch<T::kColumns>(tile, first_box, BLOCKS > 1 && row_blocks > 1, port);
  begin_turn<T>(warpgroup);
  if (!T::Schedule::kRaggedDepth || steps > 0) {
    multiply<T, BLOCKS>(s, d, ring, steps, first_box);
  } else {
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
      for (int j = 0; j < T::kColumns / 2; ++j) d[i][j] = 0;
  }
  end_turn<T>(warpgroup);
#pragma unroll
  for (int i = 0; i < BLOCKS; ++i)
    if (i < row_blocks) {
      const bool more = i + 1 < BLOCKS && i + 1 < row_blocks;
      epilogue.template store<T::kColumns>(d[i], Fragment(tile, first_box + i, more), port);
    }
}

template <class T>
DEV void consume(GemmShared<T>& s, const typename T::Epilogue& epilogue, const typename T::Schedule& schedule) {
  const int warpgroup = threadIdx.x / 128 - 1;
  const int first_box = T::kPingpong ? 0 : warpgroup * T::kRowBlocks;
  typename T::Schedule::Walk walk(schedule);
  Ring<T::kStages> ring;
  typename T::Port port(s.port[warpgroup], s.port_full[warpgroup], warpgroup);
  Tile tile;
  if (T::kPingpong && warpgroup == 1) named_bar_arrive(kOrderBarrier, 256);  // the first turn is warpgroup 0's
  for (bool own = warpgroup == 0; walk.next(tile); own = !own) {
    if (T::kPingpong && !own) {
      ring.skip(tile.depth_steps());
      continue;
    }
    const int row_blocks = ceil_div(tile.rows, 64) - first_box;
    if (T::kHalfTail && row_blocks == 1) {
      consume_tile<T, 1>(s, epilogue, tile, ring, port, warpgroup, first_box, 1);
    } else if (row_blocks > 0) {
      consume_tile<T, T::kRowBlocks>(s, epilogue, tile, ring, port, warpgroup, first_box, row_blocks);
    } else {  // no rows for this warpgroup: it gives its stages back unread
      for (int step = tile.depth_steps(); step > 0; --step, ring.advance()) {
        mbar_wait(&s.full[ring.stage], ring.parity);
        __syncwarp();  // lane 0 speaks for lanes that have seen this phase, else they could miss it for ever
        if (threadIdx.x % 32 == 0) mbar_arrive(&s.empty[ring.stage]);
      }
    }
  }
  port.drain();
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_kernel(const __grid_constant__ GemmOperand a, const __grid_constant__ GemmOperand b,
                const __grid_constant__ typename T::Epilogue epilogue,
                const __grid_constant__ typename T::Schedule schedule) {
  static_assert(T::kRowBlocks <= 2 && T::kCopyLag < T::kStages - 1);
  if constexpr (!kCompilesHopper) return;
  DYNAMIC_SHARED(GemmShared<T>, s);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      mbar_init(&s.full[stage], T::kFullArrivals);
      mbar_init(&s.empty[stage], T::kEmptyArrivals);
    }
    for (int i = 0; i < 8; ++i) mbar_init(&s.port_full[i / 4][i % 4], 1);
    fence_mbar_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<T::kProducerRegisters>();
    if constexpr (T::kCopies) {
      produce_with_copies<T>(s, a, b, schedule);
    } else {
      if (threadIdx.x == 0) produce_by_tma<T>(s, a, b, schedule);
    }
  } else {
    setmaxnreg_inc<T::kConsumerRegisters>();
    consume<T>(s, epilogue, schedule);
  }
}

}  // namespace ROUTEGRAD_VARIANT
