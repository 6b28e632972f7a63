// swiglu: the activation of dense layers (Shazeer, arXiv 2002.05202). For row r of h = (gate, up):
//   swiglu_forward    a = silu(gate) ⊙ up, silu(z) = z σ(z)
//   swiglu_backward   dgate = da ⊙ up ⊙ σ (1 + gate (1 − σ)), dup = da ⊙ gate σ, σ = σ(gate), computed again
// h, dh [T, 2F] bf16, gate in the first F columns; a, da [T, F] bf16. F a multiple of 8, pointers 16-byte aligned. a and dh
// are assigned. Arithmetic in f32. The experts' layers have theirs in the projections' epilogues (grouped_swiglu.cu).
//
// A thread has 8 columns of a row: two loads forward, three backward. Deterministic: every element is one thread's.
// Bytes: forward 6·T·F, backward 10·T·F. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s; of 16,384 rows and F = 5,632
// 129 µs and 215 µs.
#include "common/ptx.cuh"
#include "common/swiglu.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostChunks = int64_t{INT32_MAX} * kThreads;

DEV uint4 load(const bf16* from) { return ld_global_readonly(reinterpret_cast<const uint4*>(from)); }
DEV void store(bf16* to, uint4 v) { st_global(reinterpret_cast<uint4*>(to), v); }

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

DEV uint32_t product(uint32_t gate, uint32_t up) {
  return pack_bf16(Swiglu(low_bf16(gate)).silu * low_bf16(up), Swiglu(high_bf16(gate)).silu * high_bf16(up));
}

__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(bf16* a, const bf16* h, int64_t rows, int ffn) {
  const Place at(rows, ffn);
  if (!at.inside) return;
  const uint4 gate = load(h + at.gate), up = load(h + at.up);
  store(a + at.a,
        make_uint4(product(gate.x, up.x), product(gate.y, up.y), product(gate.z, up.z), product(gate.w, up.w)));
}

struct Gradients {
  uint32_t gate, up;
};
DEV Gradients gradients(uint32_t gate, uint32_t up, uint32_t da) {
  const Swiglu low(low_bf16(gate)), high(high_bf16(gate));
  return {pack_bf16(low_bf16(da) * low_bf16(up) * low.slope, high_bf16(da) * high_bf16(up) * high.slope),
          pack_bf16(low_bf16(da) * low.silu, high_bf16(da) * high.silu)};
}

__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(bf16* dh, const bf16* da, const bf16* h, int64_t rows, int ffn) {
  const Place at(rows, ffn);
  if (!at.inside) return;
  const uint4 gate = load(h + at.gate), up = load(h + at.up), d = load(da + at.a);
  const Gradients x = gradients(gate.x, up.x, d.x), y = gradients(gate.y, up.y, d.y), z = gradients(gate.z, up.z, d.z),
                  w = gradients(gate.w, up.w, d.w);
  store(dh + at.gate, make_uint4(x.gate, y.gate, z.gate, w.gate));
  store(dh + at.up, make_uint4(x.up, y.up, z.up, w.up));
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
