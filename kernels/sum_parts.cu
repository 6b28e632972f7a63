// sum_parts: out = or += Σ_p parts[p], p ascending. out [elements], parts [count, elements], f32.
// Joins the parts of a weight gradient whose rows were cut into groups so that its tiles fill the GPU.
// Deterministic: one thread an element, parts in order. Bytes: 4·(count + 1)·elements, 4·elements more to accumulate.
// FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s.
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(float4* out, const float4* parts, int count, int64_t chunks, bool accumulate) {
  const int64_t at = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (at >= chunks) return;
  float4 sum = accumulate ? ld_global(out + at) : make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int p = 0; p < count; ++p) {
    const float4 part = ld_global_readonly(parts + p * chunks + at);
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  st_global(out + at, sum);
}

}  // namespace

routegrad_status sum_parts(float* out, const float* parts, int32_t count, int64_t elements, int32_t accumulate,
                           routegrad_stream stream) {
  REQUIRE_POINTER(sum_parts, out);
  REQUIRE_POINTER(sum_parts, parts);
  REQUIRE(sum_parts, count, 1 <= count && count <= 1 << 16, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(sum_parts, elements, 1 <= elements && elements <= int64_t{1} << 36, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(sum_parts, elements);
  REQUIRE(sum_parts, accumulate, accumulate == 0 || accumulate == 1, ROUTEGRAD_OUT_OF_RANGE);
  const int64_t chunks = elements / 4;
  return launch(sum_parts_kernel, {dim3(static_cast<uint32_t>((chunks + kSumThreads - 1) / kSumThreads)), kSumThreads},
                stream, reinterpret_cast<float4*>(out), reinterpret_cast<const float4*>(parts), count, chunks,
                accumulate != 0);
}

}  // namespace ROUTEGRAD_VARIANT
