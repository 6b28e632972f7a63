// What the 32 lanes of a warp do to matrices together: ldmatrix, stmatrix, mma.sync. The last lane to come does the work of
// all, several instructions at once, since each meeting of the lanes costs a switch of threads per lane.
#include <cstring>

#include "machine.hpp"

namespace sim {

// ---- matrices of 8 x 8 16-bit elements. Lane l points at row l mod 8 of matrix l / 8; registers hold element pairs.
struct MatrixAccess {  // of one lane
  uint32_t* registers;   // [count][4]
  const uint32_t* rows;  // [count] shared addresses
  int count;
  bool transpose;
};

// Eight rows move at once; those that lie in the same 16 bytes of the 128 that all banks hold take turns.
static uint64_t conflicts(const uint32_t (&rows)[8]) {
  uint32_t taken = 0;
  for (const uint32_t row : rows) taken |= 1u << row / 16 % 8;
  return 8 - static_cast<uint64_t>(__builtin_popcount(taken));
}

// The elements that lane l's register of a matrix holds, as offsets into its rows.
struct Pair {
  int row[2], column[2];
  Pair(int l, bool transpose) {
    const int r = l / 4, c = l % 4 * 2;
    for (int e = 0; e < 2; ++e) row[e] = transpose ? c + e : r, column[e] = transpose ? r : c + e;
  }
};

template <bool WRITE>
static void move_matrices(const uint64_t* values) {
  const auto lane_of = [&](int l) { return reinterpret_cast<const MatrixAccess*>(values[l]); };
  const int count = lane_of(0)->count;
  char* const arena = machine->block->arena;
  for (int i = 0; i < count; ++i)
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = lane_of(8 * m + r)->rows[i];
      machine->counters.bank_conflicts += conflicts(rows);
      for (int l = 0; l < kWarp; ++l) {
        const Pair pair(l, lane_of(l)->transpose);
        uint32_t& own = lane_of(l)->registers[4 * i + m];
        uint16_t halves[2] = {static_cast<uint16_t>(own), static_cast<uint16_t>(own >> 16)};
        for (int e = 0; e < 2; ++e) {
          char* const element = arena + rows[pair.row[e]] + 2 * pair.column[e];
          if constexpr (WRITE)
            memcpy(element, &halves[e], 2);
          else
            memcpy(&halves[e], element, 2);
        }
        if constexpr (!WRITE) own = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
      }
    }
}

static void check_rows(const MatrixAccess& access, const char* what, bool write, Where at) {
  Block& block = *machine->block;
  for (int i = 0; i < access.count; ++i) {
    if (access.rows[i] % 16) fail(format("%s: the row address is not 16-byte aligned", what), at);
    shared_bytes(block, access.rows[i], 16, what, at);
    race::shared_access(block, access.rows[i], 16, write, at);
  }
}

void ldmatrix(uint32_t* registers, const uint32_t* rows, int count, bool transpose, Where at) {
  MatrixAccess access{registers, rows, count, transpose};
  check_rows(access, "ldmatrix", false, at);
  warp_work(move_matrices<false>, &access, at);
}

void stmatrix(const uint32_t* registers, const uint32_t* rows, int count, bool transpose, Where at) {
  MatrixAccess access{const_cast<uint32_t*>(registers), rows, count, transpose};
  check_rows(access, "stmatrix", true, at);
  warp_work(move_matrices<true>, &access, at);
}

// ---- mma.sync m16n8k16: a row of `tiles` products that share A
struct MmaLane {
  float* d;           // [tiles][4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [tiles][2]
  int tiles;
  Where where;
};

static float low_half(uint32_t pair) { return __builtin_bit_cast(float, pair << 16); }
static float high_half(uint32_t pair) { return __builtin_bit_cast(float, pair & 0xffff0000); }

static void multiply_row(const uint64_t* values) {
  constexpr int kRows = 16, kDepth = 16;
  const auto lane_of = [&](int l) -> const MmaLane& { return *reinterpret_cast<const MmaLane*>(values[l]); };
  const int tiles = lane_of(0).tiles;
  float* const a = machine->product_a;    // [k][16]
  float* const b = machine->product_b;    // [column][16]
  float* const sum = machine->product_d;  // [column][16]
  for (int l = 0; l < kWarp; ++l) {
    const MmaLane& lane = lane_of(l);
    if (lane.tiles != tiles) fail("mma: lanes of one warp disagree on the number of products", lane.where);
    const int group = l / 4, pair = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* const to = a + (pair + 8 * (i / 2)) * kRows + group + 8 * (i % 2);
      to[0] = low_half(lane.a[i]);
      to[kRows] = high_half(lane.a[i]);
    }
    for (int j = 0; j < tiles; ++j) {
      for (int half = 0; half < 2; ++half) {
        float* const to = b + (8 * j + group) * kDepth + pair + 8 * half;
        to[0] = low_half(lane.b[2 * j + half]);
        to[1] = high_half(lane.b[2 * j + half]);
      }
      for (int i = 0; i < 4; ++i) sum[(8 * j + pair + i % 2) * kRows + group + 8 * (i / 2)] = lane.d[4 * j + i];
    }
  }
  static const ProductKernel multiply = product_kernel(kRows);
  multiply(sum, a, b, 8 * tiles);
  for (int l = 0; l < kWarp; ++l)
    for (int j = 0; j < tiles; ++j)
      for (int i = 0; i < 4; ++i)
        lane_of(l).d[4 * j + i] = sum[(8 * j + l % 4 * 2 + i % 2) * kRows + l / 4 + 8 * (i / 2)];
  machine->counters.tensor_flops += 2ull * kRows * kDepth * 8 * static_cast<uint64_t>(tiles);
}

void mma_row(float* d, const uint32_t* a, const uint32_t* b, int tiles, Where at) {
  if (tiles < 1 || tiles > kMaxProductColumns / 8) fail(format("mma: a row of %d products, not 1 to 32", tiles), at);
  MmaLane lane{d, a, b, tiles, at};
  warp_work(multiply_row, &lane, at);
}

}  // namespace sim
