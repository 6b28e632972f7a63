// What a GEMM epilogue is, and the shared memory through which it stores.
//
// An epilogue is a struct passed to the kernel as a __grid_constant__ (tensor maps and pointers) with
//   template <int COLUMNS>
//   DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& port) const;  // for each kind of port
// All 128 threads of a consumer warpgroup call it with one product of 64 rows: d is the thread's accumulator fragment,
// `at` says where it lies. Data per row (a gate) is looked up by at.row(h), data per expert by at.group; sums over an
// expert's rows go to partials by block of 64 rows, added later in that order.
//   Port        the warpgroup's own shared memory, and how it is shared with TMA: Staging, where nothing is read
//   MmaPort     the same on GPUs without TMA: MmaStaging
//   kGateUp     whether the left half of d is a tile of gate, and the right half the same columns of up; a tile's
//               columns are then counted in one of them
//   kForMma     whether store takes a MmaPort; else another epilogue stands in on those GPUs
//   kPrefetch   whether it reads: prefetch<COLUMNS>(tile, first, more, port) is called before the products of a tile, of which
//               the warpgroup's first fragment is number `first`, whether or not one more follows
#pragma once
#include "gemm_schedule.cuh"
#include "ptx.cuh"

namespace ROUTEGRAD_VARIANT {

// The part of a tile that a warpgroup hands over: 64 rows by all columns. Thread t holds d[4 j + 2 h + e] at row(h),
// column(j) + e.
struct Fragment {
  int group, group_row;  // of the rows' group: its number, its first row
  int first_row, rows;   // rows past `rows` (1 … 64) belong to another group or to nobody: they must not be stored
  int first_column;
  bool more;  // the next 64 rows of the tile are the warpgroup's next fragment
  DEV Fragment(const Tile& tile, int block, bool more_follow)
      : group(tile.group),
        group_row(tile.group_row),
        first_row(tile.row + 64 * block),
        rows(tile.rows - 64 * block < 64 ? tile.rows - 64 * block : 64),
        first_column(tile.column),
        more(more_follow) {}
  // Within the fragment.
  DEV int local_row(int h) const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h; }
  DEV int row(int h) const { return first_row + local_row(h); }
  DEV int column(int j) const { return first_column + 8 * j + threadIdx.x % 4 * 2; }
};

// Columns of the piece that begins at column `first` of a fragment: what one buffer holds, or what is left.
HOST_DEV constexpr int piece_columns(int columns, int first, int most = 64) {
  return columns - first < most ? columns - first : most;
}

// A buffer holds 64 rows of 64 bf16, or of 32 where a port says so: chunks of 16 bytes XORed by the row, as TMA expects them
// (Swizzle::Span128, Span64) and so that column-wise writes do not share banks.
constexpr int kStagingBytes = 64 * 128;
template <int BOX = 64>
DEV int staging_byte(int row, int chunk) {
  static_assert(BOX == 64 || BOX == 32);
  return BOX == 64 ? row * 128 + (chunk ^ (row & 7)) * 16 : row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
}

// How the 128 threads of a consumer warpgroup share memory with each other and with TMA, whose copies one of them issues.
class WarpgroupPort {
 public:
  static constexpr bool kTma = true;
  DEV bool issuer() const { return threadIdx.x % 128 == 0; }
  // Per 16 columns of the warp's 16 rows, from column 8 j on: four 8 x 8 matrices, (rows 0 and 8) of columns 0, then of
  // columns 8.
  template <int BOX = 64>
  DEV void put(uint8_t* buffer, int j, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) const {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    stmatrix_x4(buffer + staging_byte<BOX>(warp * 16 + lane % 16, j + lane / 16), m0, m1, m2, m3);
  }
  DEV void barrier() { named_bar_sync(barrier_, 128); }
  // After filling: what all threads wrote is visible to all, and to TMA.
  DEV void publish() {
    fence_proxy_async();
    barrier();
  }
  // Ends the use of a buffer, also when no TMA store was issued, so that waits can count.
  DEV void commit() {
    if (issuer()) bulk_commit();
  }
  // Before the block's shared memory goes away.
  DEV void drain() {
    if (issuer()) bulk_wait_read<0>();
  }

 protected:
  DEV explicit WarpgroupPort(int warpgroup) : barrier_(1 + warpgroup) {}

 private:
  int barrier_;
};

// Two buffers per warpgroup: one is filled while the store of the other is under way.
class Staging : public WarpgroupPort {
 public:
  static constexpr int kBuffers = 2;
  struct Buffers {
    alignas(1024) uint8_t bytes[kBuffers][kStagingBytes];
  };
  DEV Staging(Buffers& buffers, uint64_t* /* it loads nothing */, int warpgroup)
      : WarpgroupPort(warpgroup), buffers_(buffers) {}

  // The buffer to fill: the store that read it last is done with it.
  DEV uint8_t* acquire() {
    if (issuer()) bulk_wait_read<1>();
    barrier();
    next_ ^= 1;
    return buffers_.bytes[next_];
  }

 private:
  Buffers& buffers_;
  int next_ = 0;
};

// The same without TMA and stmatrix: the threads themselves copy out what they filled.
class MmaPort {
 public:
  static constexpr bool kTma = false;
  DEV void put(uint8_t* buffer, int j, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t matrix[4] = {m0, m1, m2, m3};
#pragma unroll
    for (int m = 0; m < 4; ++m)
      *reinterpret_cast<uint32_t*>(buffer + staging_byte(row + m % 2 * 8, j + m / 2) + lane % 4 * 4) = matrix[m];
  }
  DEV void barrier() { named_bar_sync(barrier_, 128); }
  DEV void publish() { barrier(); }
  DEV void commit() {}

 protected:
  DEV explicit MmaPort(int warpgroup) : barrier_(1 + warpgroup) {}

 private:
  int barrier_;
};
class MmaStaging : public MmaPort {
 public:
  using Buffers = Staging::Buffers;
  DEV MmaStaging(Buffers& buffers, int warpgroup) : MmaPort(warpgroup), buffers_(buffers) {}

  // The buffer to fill: all threads have copied out of it before they published the other one.
  DEV uint8_t* acquire() {
    next_ ^= 1;
    return buffers_.bytes[next_];
  }

 private:
  Buffers& buffers_;
  int next_ = 0;
};

// An epilogue that stores columns as they are and reads nothing.
struct PlainEpilogue {
  using Port = Staging;
  using MmaPort = MmaStaging;
  static constexpr bool kGateUp = false, kPrefetch = false, kForMma = true;
};

}  // namespace ROUTEGRAD_VARIANT
