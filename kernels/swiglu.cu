// swiglu: the activation of dense layers (Shazeer, arXiv 2002.05202). For row r of h = (gate, up):
//   swiglu_forward    a = silu(gate) ⊙ up, silu(z) = z σ(z)
//   swiglu_backward   dgate = da ⊙ up ⊙ σ (1 + gate (1 − σ)), dup = da ⊙ gate σ, σ = σ(gate), computed again
// h, dh [T, 2F] bf16, gate in the first F columns; a, da [T, F] bf16. F a multiple of 8, pointers 16-byte aligned. a and dh
// are assigned. Arithmetic in f32. The experts' layers have theirs in the projections' epilogues (grouped_swiglu.cu).
//
// A thread has 8 columns of a row: two loads forward, three backward. Deterministic: every element is one thread's.
// Bytes: forward 6·T·F, backward 10·T·F. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; of 16,384 rows and F = 5,632
// 129 µs and 215 µs.
#include "common/eight.cuh"
#include "common/swiglu.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostChunks = int64_t{INT32_MAX} * kThreads;

// Where 8 columns of a row lie.
struct Place {
  bool inside;
  int64_t gate, up, a;  // elements from the start of h, h and a
  DEV Place(int64_t rows, int ffn) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, chunks = ffn / 8;
    const int64_t row = at / chunks, column = at % chunks * 8;
    inside = row < rows;
    gate = 2 * row * ffn + column;
    up = gate + ffn;
    a = row * ffn + column;
  }
};

__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(bf16* a, const bf16* h, int64_t rows, int ffn) {
  const Place at(rows, ffn);
  if (!at.inside) return;
  const Eight gate = load_eight_readonly(h + at.gate), up = load_eight_readonly(h + at.up);
  Eight out;
#pragma unroll
  for (int k = 0; k < 8; ++k) out.value[k] = Swiglu(gate.value[k]).silu * up.value[k];
  store_eight(a + at.a, out);
}

__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(bf16* dh, const bf16* da, const bf16* h, int64_t rows, int ffn) {
  const Place at(rows, ffn);
  if (!at.inside) return;
  const Eight gate = load_eight_readonly(h + at.gate), up = load_eight_readonly(h + at.up), d = load_eight_readonly(da + at.a);
  Eight dgate, dup;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const Swiglu s(gate.value[k]);
    dgate.value[k] = d.value[k] * up.value[k] * s.slope;
    dup.value[k] = d.value[k] * s.silu;
  }
  store_eight(dh + at.gate, dgate);
  store_eight(dh + at.up, dup);
}

dim3 blocks(int64_t rows, int ffn) {
  return dim3(static_cast<uint32_t>((rows * (ffn / 8) + kThreads - 1) / kThreads));
}

}  // namespace

#define REQUIRE_SWIGLU_SIZES(launcher)                                                  \
  REQUIRE(launcher, rows, 1 <= rows && rows <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE);      \
  REQUIRE(launcher, ffn, 1 <= ffn && ffn <= 1 << 24, ROUTEGRAD_OUT_OF_RANGE);           \
  REQUIRE_MULTIPLE_OF_8(launcher, ffn);                                                 \
  REQUIRE(launcher, rows, rows * (ffn / 8) <= kMostChunks, ROUTEGRAD_OVERFLOW)

routegrad_status swiglu_forward(void* a, const void* h, int64_t rows, int32_t ffn, routegrad_stream stream) {
  REQUIRE_POINTER(swiglu_forward, a);
  REQUIRE_POINTER(swiglu_forward, h);
  REQUIRE_SWIGLU_SIZES(swiglu_forward);
  return launch(swiglu_forward_kernel, {blocks(rows, ffn), kThreads}, stream, static_cast<bf16*>(a),
                static_cast<const bf16*>(h), rows, ffn);
}

routegrad_status swiglu_backward(void* dh, const void* da, const void* h, int64_t rows, int32_t ffn,
                                 routegrad_stream stream) {
  REQUIRE_POINTER(swiglu_backward, dh);
  REQUIRE_POINTER(swiglu_backward, da);
  REQUIRE_POINTER(swiglu_backward, h);
  REQUIRE_SWIGLU_SIZES(swiglu_backward);
  return launch(swiglu_backward_kernel, {blocks(rows, ffn), kThreads}, stream, static_cast<bf16*>(dh),
                static_cast<const bf16*>(da), static_cast<const bf16*>(h), rows, ffn);
}

}  // namespace ROUTEGRAD_VARIANT
