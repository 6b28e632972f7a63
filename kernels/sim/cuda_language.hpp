// The part of the CUDA C++ language that kernels use, for the C++ compiler: qualifiers, built-in variables, vector
// types, warp functions, atomics, intrinsics. Add what a kernel needs, with CUDA's name and meaning.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
// The C library has private functions of these names.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __cosf(x) std::cos(static_cast<float>(x))
#define __sinf(x) std::sin(static_cast<float>(x))

namespace sim {

enum class Collective : int;
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, std::source_location at);
void named_barrier(int id, int threads, bool wait, std::source_location at);
int lane();
// Lets other threads run, inside a loop that polls memory.
void yield(std::source_location at);

namespace language {

using Where = std::source_location;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;

// ---- block and warp
inline void __syncthreads(Where at = Where::current()) { named_barrier(0, 0, true, at); }
inline void __syncwarp(uint32_t mask = ~0u, Where at = Where::current()) {
  warp_collective(Collective{0}, mask, 0, 0, at);
}
template <class T>
T shuffle_from(uint32_t mask, T value, int source, Where at) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(Collective{1}, mask, bits, source, at);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, Where at = Where::current()) {
  return shuffle_from(mask, value, (lane() & ~(width - 1)) + (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, Where at = Where::current()) {
  const int source = lane() ^ bits;
  return shuffle_from(mask, value, source / width > lane() / width ? lane() : source, at);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, Where at = Where::current()) {
  const bool inside = (lane() & (width - 1)) + static_cast<int>(by) < width;
  return shuffle_from(mask, value, inside ? lane() + static_cast<int>(by) : lane(), at);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, Where at = Where::current()) {
  const bool inside = (lane() & (width - 1)) >= static_cast<int>(by);
  return shuffle_from(mask, value, inside ? lane() - static_cast<int>(by) : lane(), at);
}
inline unsigned __ballot_sync(uint32_t mask, bool vote, Where at = Where::current()) {
  return static_cast<unsigned>(warp_collective(Collective{2}, mask, vote, 0, at));
}
inline bool __any_sync(uint32_t mask, bool vote, Where at = Where::current()) {
  return __ballot_sync(mask, vote, at) != 0;
}
inline bool __all_sync(uint32_t mask, bool vote, Where at = Where::current()) {
  return __ballot_sync(mask, !vote, at) == 0;
}

// ---- atomics on shared and global integers (floats have none here: their sum would depend on the order)
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "no atomics on floats: the order of additions is not fixed");
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  T seen = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (seen < value && !__atomic_compare_exchange_n(p, &seen, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return seen;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  T seen = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (value < seen && !__atomic_compare_exchange_n(p, &seen, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return seen;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
// Gives way in a loop that polls memory, as on the GPU.
inline void __nanosleep(unsigned, Where at = Where::current()) { yield(at); }

// ---- intrinsics
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
// The GPU's reciprocal is 0 before a denominator overflows (CUDA C++ Programming Guide, intrinsic functions).
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f ? 0.0f * x : x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace language
}  // namespace sim
