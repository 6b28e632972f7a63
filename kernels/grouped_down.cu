// grouped_down: the down projection of the experts, with what the mean of each expert's outputs is made of. Rows r of
// expert e are offsets[e] <= r < offsets[e + 1]; t(r) is row_token[r], or r where that is null; R = `rows` is an upper
// bound, rows from offsets[E] on are neither used nor written.
//   out[r] = W[e] a[r]                                a [R, F] bf16, W [E, D, F] bf16, out [R, D] bf16, assigned
//   column_sums[offsets[e] / 64 + e + b] = Σ_r w_r W[e] a[r] over rows r of block b
//                                                     [R / 64 + E, D] f32, assigned; w_r = gates[t(r), e], or 1
// Block b of an expert is its rows 64 b … 64 b + 63, as many as there are; blocks of different experts are disjoint by
// their index, and entries without a block are not written. Sums are of the f32 products before they are rounded to
// bf16. column_sums may be null, then gates and row_token are not read. D, F multiples of 8, pointers 16-byte aligned.
//
// Deterministic: each element belongs to one tile, each block's sum to one warpgroup, in one order whatever the tile.
// FLOPs: 2·R·D·F. Bytes: 2·R·(F + D) + 2·E·D·F, and for the sums 4·D·(R / 64 + E) written, 8·R read per tile of
// columns. Floor: max(FLOPs / 790e12, bytes / 4.3e12) s.
#include "common/epilogue_column_sums.cuh"
#include "common/gemm_launch.cuh"

namespace ROUTEGRAD_VARIANT {

routegrad_status grouped_down_forward(void* out, float* column_sums, const void* a, const void* w, const float* gates,
                                      const int32_t* offsets, const int32_t* row_token, int64_t rows, int64_t tokens,
                                      int32_t experts, int32_t hidden, int32_t ffn, int32_t tile,
                                      routegrad_stream stream) {
  REQUIRE_POINTER(grouped_down_forward, out);
  REQUIRE(grouped_down_forward, column_sums, reinterpret_cast<uintptr_t>(column_sums) % 16 == 0, ROUTEGRAD_MISALIGNED);
  REQUIRE_POINTER(grouped_down_forward, a);
  REQUIRE_POINTER(grouped_down_forward, w);
  REQUIRE_GEMM_LAUNCH(grouped_down_forward, ROUTEGRAD_GEMM_DOWN_FORWARD, hidden, ffn, 1);
  if (column_sums && gates) REQUIRE_HEIGHT(grouped_down_forward, tokens, row_token);
  StoreAndSumColumns epilogue{};
  epilogue.gates = {gates, row_token, experts};
  epilogue.sums = column_sums;
  if (const auto status = make_output(&epilogue.rows.out, out, hidden, 1, rows)) return status;
  const GemmArguments arguments{
      a,    w,      nullptr, nullptr,
      rows, hidden, offsets, product_sizes(ROUTEGRAD_GEMM_DOWN_FORWARD, rows, experts, hidden, ffn)};
  return launch_gemm<ROUTEGRAD_GEMM_DOWN_FORWARD, Gather::None>(arguments, epilogue, tile, stream);
}

}  // namespace ROUTEGRAD_VARIANT
