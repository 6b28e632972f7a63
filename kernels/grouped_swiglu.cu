// grouped_swiglu: the gate and up projection of the experts with SwiGLU, and its backward from the gradient of the
// layer's output. Rows r of expert e are offsets[e] <= r < offsets[e + 1]; t(r) is row_token[r], or r where that is
// null; R = `rows` is an upper bound, rows from offsets[E] on are neither used nor written. h is [R, 2F]: gate in
// columns 0 … F - 1, then up.
//   forward   h[r] = W[e] x[t(r)]               x [X, D], W [E, 2F, D], gate first; h [R, 2F]
//             a[r] = silu(gate) ⊙ up            a [R, F], from the f32 sums, not from h as rounded
//   backward  dA'  = dout[t'(r)] W[e]           t'(r) is dout_row_token[r], or r where that is null; dout [X, D], W [E, D, F], the down projection; dA' is not stored
//             A    = silu(gate) ⊙ up, from h    w_r = gates[t(r), e], gates [T, E] f32
//             scaled_a[r] = w_r A               [R, F], for the gradient of W: Σ_r dout[t(r)] scaled_a[r]ᵀ
//             dh[r] = w_r dA' ⊙ (up silu'(gate), silu(gate))        [R, 2F]
//             dots[r, c] = Σ dA' A over column tile c               [R, dot_columns] f32
// The sum of a row's dots is ⟨dout, e(x)⟩, the gate's gradient, e(x) being the expert's output.
// bf16 unless said; sums and SwiGLU in f32; every output is assigned. D and F multiples of 8, pointers 16-byte aligned.
// dh must not be h: neighbouring tiles read the edge of each other's h.
//
// Deterministic: each element belongs to one tile, and sums run in one order; dots depend on the tile (their number and
// the order of their sum), nothing else does.
// FLOPs: forward 4·R·F·D, backward 2·R·F·D, on tensor cores. Bytes: forward 2·R·(D + 3F) + 4·E·F·D, backward
// 2·R·(D + 5F) + 2·E·F·D + 4·R·(dot_columns + 2); row_token is read again, from L1, for every 16 bytes copied.
// Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/epilogue_swiglu.cuh"
#include "common/epilogue_swiglu_backward.cuh"
#include "common/gemm_launch.cuh"

namespace ROUTEGRAD_VARIANT {

routegrad_status grouped_swiglu_forward(void* h, void* a, const void* x, const void* w, const int32_t* offsets,
                                        const int32_t* row_token, int64_t rows, int64_t x_rows, int32_t experts,
                                        int32_t ffn, int32_t hidden, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(grouped_swiglu_forward, h);
  REQUIRE_POINTER(grouped_swiglu_forward, a);
  REQUIRE_POINTER(grouped_swiglu_forward, x);
  REQUIRE_POINTER(grouped_swiglu_forward, w);
  REQUIRE_GEMM_LAUNCH(grouped_swiglu_forward, ROUTEGRAD_GEMM_SWIGLU_FORWARD, ffn, hidden, 2);
  REQUIRE_HEIGHT(grouped_swiglu_forward, x_rows, row_token);
  StoreSwiglu store{};
  if (const auto status = make_output(&store.h, h, ffn, 2, rows)) return status;
  if (const auto status = make_output(&store.a, a, ffn, 1, rows)) return status;
  const GemmArguments arguments{
      x,      w,       row_token, nullptr,
      x_rows, 2 * ffn, offsets,   product_sizes(ROUTEGRAD_GEMM_SWIGLU_FORWARD, rows, experts, 2 * ffn, hidden)};
  if (!row_token) return launch_gemm<ROUTEGRAD_GEMM_SWIGLU_FORWARD, Gather::None>(arguments, store, tile, stream);
  return launch_gemm<ROUTEGRAD_GEMM_SWIGLU_FORWARD, Gather::A>(arguments, store, tile, stream);
}

namespace {

int dot_columns_of(int64_t rows, int experts, int hidden, int ffn, int tile) {
  const ProductSizes sizes = product_sizes(ROUTEGRAD_GEMM_SWIGLU_BACKWARD, rows, experts, hidden, ffn);
  if (tile == ROUTEGRAD_TILE_AUTO) tile = choose_tile(ROUTEGRAD_GEMM_SWIGLU_BACKWARD, sizes, multiprocessors()).tile;
  if constexpr (kForAmpere)
    if (const TileShape* t = on_hopper() ? nullptr : find_mma_tile(tile)) return ceil_div(ffn, t->columns);
  for (const TileShape& t : kTileShapes)
    if (t.tile == tile) return ceil_div(ffn, t.columns);
  return 0;
}

}  // namespace

routegrad_status grouped_swiglu_backward(void* dh, void* scaled_a, float* dots, const void* dout, const void* w,
                                         const void* h, const float* gates, const int32_t* offsets,
                                         const int32_t* row_token, const int32_t* dout_row_token, int64_t rows,
                                         int64_t dout_rows, int32_t experts, int32_t hidden, int32_t ffn, int32_t dot_columns, int32_t tile,
                                         routegrad_stream stream) {
  REQUIRE_POINTER(grouped_swiglu_backward, dh);
  REQUIRE_POINTER(grouped_swiglu_backward, scaled_a);
  REQUIRE_POINTER(grouped_swiglu_backward, dots);
  REQUIRE_POINTER(grouped_swiglu_backward, dout);
  REQUIRE_POINTER(grouped_swiglu_backward, w);
  REQUIRE_POINTER(grouped_swiglu_backward, h);
  REQUIRE(grouped_swiglu_backward, h, h != dh, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_POINTER(grouped_swiglu_backward, gates);
  REQUIRE_GEMM_LAUNCH(grouped_swiglu_backward, ROUTEGRAD_GEMM_SWIGLU_BACKWARD, hidden, ffn, 1);
  REQUIRE_HEIGHT(grouped_swiglu_backward, dout_rows, dout_row_token);
  REQUIRE(grouped_swiglu_backward, dot_columns, dot_columns == dot_columns_of(rows, experts, hidden, ffn, tile),
          ROUTEGRAD_OUT_OF_RANGE);
  SwigluBackward epilogue{};
  epilogue.dots = dots;
  epilogue.dot_columns = dot_columns;
  epilogue.gates = {gates, row_token, experts};
  if (const auto status = output_map<LoadingPort::kBox>(&epilogue.h, h, ffn, 2, rows)) return status;
  if (const auto status = make_output<LoadingPort::kBox>(&epilogue.dh, dh, ffn, 2, rows)) return status;
  if (const auto status = make_output<LoadingPort::kBox>(&epilogue.scaled_a, scaled_a, ffn, 1, rows)) return status;
  const GemmArguments arguments{
      dout,      w,      dout_row_token, nullptr,
      dout_rows, hidden, offsets,   product_sizes(ROUTEGRAD_GEMM_SWIGLU_BACKWARD, rows, experts, hidden, ffn)};
  if constexpr (kForAmpere)
    if (!on_hopper())
      return launch_mma<ROUTEGRAD_GEMM_SWIGLU_BACKWARD>(
          arguments, MmaSwigluBackward{{epilogue}, static_cast<const bf16*>(h)}, tile, stream);
  if (!dout_row_token)
    return launch_gemm<ROUTEGRAD_GEMM_SWIGLU_BACKWARD, Gather::None>(arguments, epilogue, tile, stream);
  return launch_gemm<ROUTEGRAD_GEMM_SWIGLU_BACKWARD, Gather::A>(arguments, epilogue, tile, stream);
}

routegrad_status grouped_swiglu_dot_columns(int32_t* columns, int64_t rows, int32_t experts, int32_t hidden,
                                            int32_t ffn, int32_t tile) {
  REQUIRE(grouped_swiglu_dot_columns, columns, columns != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE_GEMM_SIZES(grouped_swiglu_dot_columns, ROUTEGRAD_GEMM_SWIGLU_BACKWARD, hidden, ffn, 1);
  REQUIRE(grouped_swiglu_dot_columns, tile, tile_exists(tile, ROUTEGRAD_GEMM_SWIGLU_BACKWARD), ROUTEGRAD_OUT_OF_RANGE);
  if (multiprocessors() < 1) return ROUTEGRAD_CUDA_ERROR | 100 << 8 /* cudaErrorNoDevice */;
  *columns = dot_columns_of(rows, experts, hidden, ffn, tile);
  return ROUTEGRAD_OK;
}

}  // namespace ROUTEGRAD_VARIANT
