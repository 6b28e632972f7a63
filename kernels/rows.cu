// rows: arithmetic of whole rows [T, D] bf16, for what is no part of a larger kernel: residual sums, biases, learned
// scales, and the sigmoid gate of a shared expert.
//   row_arithmetic      out = a + b or a ⊙ b; b has T rows, or one for all. out may be a
//   column_sums         parts[n, d] = Σ over the rows t of run n of x[t, d] · y[t, d] · s[t, d / piece]; y or s or both may
//                       be missing. Gradients of biases, scales and norms of pieces; sum_parts adds the runs
//   gated_rows          gates[t] = σ(⟨x_t, w⟩);  y_t = gates[t] v_t
//   gated_rows_backward dv_t = gates[t] dy_t;  dscores[t] = gates[t] (1 − gates[t]) ⟨dy_t, v_t⟩;  dx_t = or += dscores[t] w
// Rows are bf16, D and piece multiples of 8; parts [N, D], s [T, D / piece], gates, dscores [T] f32; w [D] bf16. In
// column_sums the rows of x and y lie `pitch` elements apart; run n has the rows n·⌈T / N⌉ … of T. All assigned but dx.
//
// Arithmetic in f32. A thread has 8 columns; of column_sums eight warps take every eighth row of a run and are added in
// order, of gated_rows a warp has a row. Deterministic: one writer an element, sums in a fixed order.
// Bytes: row_arithmetic 6·T·D (4·T·D + 2·D with one row of b), column_sums 2·T·D or 4·T·D and 4·N·D, gated_rows 6·T·D,
// backward 8·T·D, 2·T·D more to accumulate. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s.
#include "common/eight.cuh"
#include "common/swiglu.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostChunks = int64_t{INT32_MAX} * kThreads;
constexpr int kMaxRuns = 65535;

// Grid: a thread a chunk of 8 columns.
__global__ void __launch_bounds__(kThreads)
    row_arithmetic_kernel(bf16* out, const bf16* a, const bf16* b, int64_t chunks, int row_chunks, bool one_row,
                          bool multiply) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= chunks) return;
  Eight u = load_eight(a + 8 * at);
  const Eight v = load_eight(b + 8 * (one_row ? at % row_chunks : at));
#pragma unroll
  for (int k = 0; k < 8; ++k) u.value[k] = multiply ? u.value[k] * v.value[k] : u.value[k] + v.value[k];
  store_eight(out + 8 * at, u);
}

struct Columns {
  float* parts;
  const bf16 *x, *y;
  const float* scales;
  int64_t rows, pitch;
  int run_rows, width, piece;
};
struct ColumnShared {
  Eight sum[kWarps][32];
};

// Grid (tiles of 256 columns, runs).
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const __grid_constant__ Columns c) {
  DYNAMIC_SHARED(ColumnShared, s);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = static_cast<int>(blockIdx.x) * 256 + 8 * lane, pieces = c.width / c.piece;
  const int64_t first = int64_t{blockIdx.y} * c.run_rows, last = min(first + c.run_rows, c.rows);
  Eight sum{};
  if (column < c.width) {
    for (int64_t row = first + warp; row < last; row += kWarps) {
      const Eight x = load_eight(c.x + row * c.pitch + column);
      const float scale = c.scales ? ld_global_readonly(c.scales + row * pieces + column / c.piece) : 1;
      Eight y{};
      if (c.y) y = load_eight(c.y + row * c.pitch + column);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum.value[k] += x.value[k] * (c.y ? y.value[k] * scale : scale);
    }
  }
  s.sum[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= c.width) return;
  for (int w = 1; w < kWarps; ++w)
#pragma unroll
    for (int k = 0; k < 8; ++k) sum.value[k] += s.sum[w][lane].value[k];
  const auto& v = sum.value;
  float4* const to = reinterpret_cast<float4*>(c.parts + int64_t{blockIdx.y} * c.width + column);
  st_global(to, make_float4(v[0], v[1], v[2], v[3]));
  st_global(to + 1, make_float4(v[4], v[5], v[6], v[7]));
}

// ⟨a, b⟩ of two rows, on every lane of the warp.
DEV float dot_of_warp(const bf16* a, const bf16* b, int width) {
  float sum = 0;
  for (int column = 8 * static_cast<int>(threadIdx.x % 32); column < width; column += 256) {
    const Eight u = load_eight(a + column), v = load_eight(b + column);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += u.value[k] * v.value[k];
  }
  return sum_of_warp(sum);
}

DEV Eight scaled(Eight v, float scale) {
#pragma unroll
  for (int k = 0; k < 8; ++k) v.value[k] *= scale;
  return v;
}

__global__ void __launch_bounds__(kThreads)
    gated_rows_kernel(bf16* y, float* gates, const bf16* x, const bf16* w, const bf16* v, int64_t rows, int width) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const float gate = sigmoid(dot_of_warp(x + row * width, w, width));
  if (threadIdx.x % 32 == 0) st_global(gates + row, gate);
  for (int column = 8 * static_cast<int>(threadIdx.x % 32); column < width; column += 256)
    store_eight(y + row * width + column, scaled(load_eight(v + row * width + column), gate));
}

// Six blocks a multiprocessor: left alone, ptxas aims at eight and spills.
__global__ void __launch_bounds__(kThreads, 6)
    gated_rows_backward_kernel(bf16* dx, bf16* dv, float* dscores, const bf16* dy, const float* gates, const bf16* v,
                               const bf16* w, int64_t rows, int width, bool accumulate) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t first = row * width;
  const float gate = ld_global_readonly(gates + row);
  const float dscore = gate * (1 - gate) * dot_of_warp(dy + first, v + first, width);
  if (threadIdx.x % 32 == 0) st_global(dscores + row, dscore);
  for (int column = 8 * static_cast<int>(threadIdx.x % 32); column < width; column += 256) {
    store_eight(dv + first + column, scaled(load_eight(dy + first + column), gate));
    Eight d = scaled(load_eight(w + column), dscore);
    if (accumulate) {
      const Eight before = load_eight(dx + first + column);
#pragma unroll
      for (int k = 0; k < 8; ++k) d.value[k] += before.value[k];
    }
    store_eight(dx + first + column, d);
  }
}

dim3 blocks(int64_t units, int each) { return dim3(static_cast<uint32_t>((units + each - 1) / each)); }

}  // namespace

#define REQUIRE_ROWS(launcher)                                                          \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);      \
  REQUIRE(launcher, width, 1 <= width && width <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);     \
  REQUIRE_MULTIPLE_OF_8(launcher, width)

routegrad_status row_arithmetic(void* out, const void* a, const void* b, int64_t rows, int64_t b_rows, int32_t width,
                                int32_t multiply, routegrad_stream stream) {
  REQUIRE_POINTER(row_arithmetic, out);
  REQUIRE_POINTER(row_arithmetic, a);
  REQUIRE_POINTER(row_arithmetic, b);
  REQUIRE_ROWS(row_arithmetic);
  REQUIRE(row_arithmetic, rows, rows * (width / 8) <= kMostChunks, ROUTEGRAD_OVERFLOW);
  REQUIRE(row_arithmetic, b_rows, b_rows == 1 || b_rows == rows, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(row_arithmetic, multiply, multiply == 0 || multiply == 1, ROUTEGRAD_OUT_OF_RANGE);
  const int64_t chunks = rows * (width / 8);
  return launch(row_arithmetic_kernel, {blocks(chunks, kThreads), kThreads}, stream, static_cast<bf16*>(out),
                static_cast<const bf16*>(a), static_cast<const bf16*>(b), chunks, width / 8, b_rows == 1, multiply != 0);
}

routegrad_status column_sums(float* parts, const void* x, const void* y, const float* scales, int64_t rows, int32_t width,
                             int64_t pitch, int32_t piece, int32_t runs, routegrad_stream stream) {
  REQUIRE_POINTER(column_sums, parts);
  REQUIRE_POINTER(column_sums, x);
  if (y) REQUIRE_POINTER(column_sums, y);
  if (scales) REQUIRE_POINTER(column_sums, scales);
  REQUIRE_ROWS(column_sums);
  REQUIRE(column_sums, pitch, width <= pitch && pitch <= int64_t{1} << 31, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(column_sums, pitch);
  REQUIRE(column_sums, piece, 1 <= piece && piece <= width && width % piece == 0, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(column_sums, piece);
  REQUIRE(column_sums, runs, 1 <= runs && runs <= kMaxRuns, ROUTEGRAD_OUT_OF_RANGE);
  const Columns columns{parts, static_cast<const bf16*>(x),
                        static_cast<const bf16*>(y),
                        scales,
                        rows,
                        pitch,
                        static_cast<int>((rows + runs - 1) / runs),
                        width,
                        piece};
  const dim3 grid(static_cast<uint32_t>((width + 255) / 256), static_cast<uint32_t>(runs));
  return launch(column_sums_kernel, {grid, kThreads, shared_bytes<ColumnShared>}, stream, columns);
}

routegrad_status gated_rows(void* y, float* gates, const void* x, const void* w, const void* v, int64_t rows,
                            int32_t width, routegrad_stream stream) {
  REQUIRE_POINTER(gated_rows, y);
  REQUIRE_POINTER(gated_rows, gates);
  REQUIRE_POINTER(gated_rows, x);
  REQUIRE_POINTER(gated_rows, w);
  REQUIRE_POINTER(gated_rows, v);
  REQUIRE_ROWS(gated_rows);
  return launch(gated_rows_kernel, {blocks(rows, kWarps), kThreads}, stream, static_cast<bf16*>(y), gates,
                static_cast<const bf16*>(x), static_cast<const bf16*>(w), static_cast<const bf16*>(v), rows, width);
}

routegrad_status gated_rows_backward(void* dx, void* dv, float* dscores, const void* dy, const float* gates, const void* v,
                                     const void* w, int64_t rows, int32_t width, int32_t accumulate,
                                     routegrad_stream stream) {
  REQUIRE_POINTER(gated_rows_backward, dx);
  REQUIRE_POINTER(gated_rows_backward, dv);
  REQUIRE_POINTER(gated_rows_backward, dscores);
  REQUIRE_POINTER(gated_rows_backward, dy);
  REQUIRE_POINTER(gated_rows_backward, gates);
  REQUIRE_POINTER(gated_rows_backward, v);
  REQUIRE_POINTER(gated_rows_backward, w);
  REQUIRE_ROWS(gated_rows_backward);
  REQUIRE(gated_rows_backward, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  return launch(gated_rows_backward_kernel, {blocks(rows, kWarps), kThreads}, stream, static_cast<bf16*>(dx),
                static_cast<bf16*>(dv), dscores, static_cast<const bf16*>(dy), gates, static_cast<const bf16*>(v),
                static_cast<const bf16*>(w), rows, width, accumulate != 0);
}

}  // namespace ROUTEGRAD_VARIANT
