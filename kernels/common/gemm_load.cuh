// The producer side of a GEMM: one operand tile into shared memory, by TMA or by cp.async.
//
// A tile is a row of boxes; a box is 64 rows of 64 bf16 of a row-major matrix, 128 bytes a row, chunks of 16 bytes
// XORed by the row (8 KB). Both majors are made of the same boxes:
//   K-major   a box holds 64 rows of m or n, and 64 of k: boxes follow each other along the rows of the matrix
//   MN-major  a box holds 64 rows of k, and 64 of m or n: boxes follow each other along its columns
// cp.async does what TMA cannot: rows that an index names, and rows that end inside a box (zero-filled, not read).
#pragma once
#include "gemm_schedule.cuh"
#include "ptx.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kBoxRows = 64, kBoxColumns = 64, kBoxElements = kBoxRows * kBoxColumns;
constexpr int kBoxBytes = kBoxElements * 2;

struct GemmOperand {
  TensorMap map;             // (columns, rows, groups)
  const bf16* data;          // [rows, width], for cp.async
  const int32_t* row_index;  // the row of `data` for each row of the product; null: the same row
  int width;
  int up_row = 0;  // of W [E, 2F, D]: where up begins
};

// The place of box `box` of an operand at depth k, in its matrix.
struct BoxPlace {
  int column, row;
};
template <Major MAJOR>
DEV BoxPlace box_place(int first, int box, int k) {
  return MAJOR == Major::K ? BoxPlace{k, first + 64 * box} : BoxPlace{first + 64 * box, k};
}

// cp.async of `boxes` boxes by the 128 threads of a warpgroup: thread t copies chunk t % 8 of rows
// t / 8 + 16 i. Rows of the product from `last` (K-major) or `last_k` (MN-major) on, and columns past the matrix, are
// zero. The row index is read again for every box (from L1), since keeping the rows costs more registers than there
// are.
template <Major MAJOR, class Operand>
DEV void copy_boxes(bf16* tile, const Operand& operand, int boxes, int first, int last, int k, int last_k) {
  const int chunk = threadIdx.x % 8;
  for (int box = 0; box < boxes; ++box) {
    const BoxPlace place = box_place<MAJOR>(first, box, k);
    const int column = place.column + chunk * 8, end = MAJOR == Major::K ? last : last_k;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in_box = static_cast<int>(threadIdx.x) % 128 / 8 + 16 * i, row = place.row + in_box;
      const bool valid = row < end && column < operand.width;
      int64_t source = 0;
      if (valid)
        source = static_cast<int64_t>(operand.row_index ? ld_global_readonly(operand.row_index + row) : row) *
                     operand.width +
                 column;
      cp_async_16(tile + box * kBoxElements + in_box * kBoxColumns + (chunk ^ (in_box & 7)) * 8, operand.data + source,
                  valid ? 16 : 0);
    }
  }
}

}  // namespace ROUTEGRAD_VARIANT
