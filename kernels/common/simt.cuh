// The seam: one source, two machines. Under nvcc this is CUDA; under the C++ compiler it is the SIMT simulator.
// A kernel's file includes this (and others of common/) and nothing of CUDA or the simulator.
//
// Everything lives in `namespace ROUTEGRAD_VARIANT`, a name of its own per build, so that two builds linked into one
// binary can never share a symbol.
//
//   DEV                     a device function, always inlined
//   Where                   the caller's place in the source, for the simulator's messages; empty on the GPU
//   ON_GPU(...) ON_SIM(...) code for one machine only
//   DYNAMIC_SHARED(T, s)    `T& s` at the start of dynamic shared memory, at alignof(T); launch with shared_bytes<T>
//   launch(...)             starts a kernel, returns a status
//   bf16                    the type; bits(x), to_float(x), to_bf16(x), pack_bf16(lo, hi)
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define ROUTEGRAD_VARIANT rg_cuda
#define ON_GPU(...) __VA_ARGS__
#define ON_SIM(...)
#define DEV __device__ __forceinline__
#define HOST_DEV __host__ __device__ __forceinline__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#else
#define ROUTEGRAD_VARIANT rg_sim
#define ON_GPU(...)
#define ON_SIM(...) __VA_ARGS__
#define DEV inline __attribute__((always_inline))
#define HOST_DEV inline __attribute__((always_inline))
#include "../sim/cuda_language.hpp"
#include "../sim/sim.hpp"
#endif

#include "status.cuh"

// For which GPUs a build is (build/cuda.rs says): Hopper's code is TMA and wgmma, Ampere's is cp.async and mma.sync, which
// every later GPU has too. The simulator has both.
#ifndef ROUTEGRAD_FOR_HOPPER
#define ROUTEGRAD_FOR_HOPPER 1
#endif
#ifndef ROUTEGRAD_FOR_AMPERE
#ifdef __CUDACC__
#define ROUTEGRAD_FOR_AMPERE 0
#else
#define ROUTEGRAD_FOR_AMPERE 1
#endif
#endif

namespace ROUTEGRAD_VARIANT {

constexpr bool kForHopper = ROUTEGRAD_FOR_HOPPER, kForAmpere = ROUTEGRAD_FOR_AMPERE;
// Whether the architecture that is being compiled for gets the body of a kernel of each kind; the others get empty ones,
// which are never launched.
#if defined(__CUDA_ARCH__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kCompilesHopper = true, kCompilesAmpere = false;
#elif defined(__CUDA_ARCH__)
constexpr bool kCompilesHopper = false, kCompilesAmpere = true;
#else
constexpr bool kCompilesHopper = true, kCompilesAmpere = true;
#endif

#ifdef __CUDACC__
struct Where {
  HOST_DEV static constexpr Where current() { return {}; }
};
using bf16 = __nv_bfloat16;
using TensorMap = CUtensorMap;
// The offset keeps the pointer an offset of the array, so that the compiler still sees shared memory.
#define DYNAMIC_SHARED(T, s)                                                                                     \
  extern __shared__ __align__(16) uint8_t dynamic_shared_bytes[];                                                \
  T& s = *reinterpret_cast<T*>(dynamic_shared_bytes + (-(uint32_t)__cvta_generic_to_shared(dynamic_shared_bytes) & \
                                                       (uint32_t)(alignof(T) - 1)))
#else
using namespace sim::language;
using Where = sim::Where;
using TensorMap = sim::TensorMap;
struct bf16 {
  uint16_t bits;
};
#define DYNAMIC_SHARED(T, s) T& s = *reinterpret_cast<T*>(::sim::dynamic_shared(alignof(T), sizeof(T)))
#endif

// Bytes to ask for at launch: the object and the room to align it.
template <class T>
constexpr size_t shared_bytes = sizeof(T) + alignof(T);

// ---- bf16: round to nearest, ties to even; NaN becomes the quiet NaN 0x7fff.
HOST_DEV float bf16_bits_to_float(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } v{bits << 16};
  return v.f;
}
DEV float to_float(bf16 x) {
  ON_GPU(return __bfloat162float(x);)
  ON_SIM(return bf16_bits_to_float(x.bits);)
}
DEV bf16 to_bf16(float x) {
  ON_GPU(return __float2bfloat16_rn(x);)
  ON_SIM(return bf16{sim::bf16_round(x)};)
}
// The two halves of a packed pair, low first.
DEV float low_bf16(uint32_t pair) { return bf16_bits_to_float(pair & 0xffff); }
DEV float high_bf16(uint32_t pair) { return bf16_bits_to_float(pair >> 16); }

// ---- global memory: plain loads and stores of up to 16 bytes, counted by the simulator.
template <class T>
DEV T ld_global(const T* p) {
  ON_SIM(sim::count_read(sizeof(T));)
  return *p;
}
// For data that nothing writes during the kernel.
template <class T>
DEV T ld_global_readonly(const T* p) {
  ON_SIM(sim::count_read(sizeof(T)); return *p;)
  ON_GPU(return __ldg(p);)
}
template <class T>
DEV void st_global(T* p, T value) {
  ON_SIM(sim::count_written(sizeof(T));)
  *p = value;
}

// ---- host side
// Streaming multiprocessors of the current device; 0 when it cannot be asked.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
#else
  return sim::multiprocessors();
#endif
}

// Of the current device: 10 · major + minor of its compute capability; 0 when it cannot be asked.
inline int architecture() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
  return 10 * major + minor;
#else
  return sim::architecture();
#endif
}

// Whether launchers take the kernels for Hopper. A build for Hopper alone does not ask.
inline bool on_hopper() {
  if constexpr (kForHopper && kForAmpere)
    return architecture() == 90;
  else
    return kForHopper;
}

// Bytes of shared memory that a block of the current device may ask for; 0 when it cannot be asked.
inline int max_shared() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : 0;
#else
  return static_cast<int>(sim::max_shared());
#endif
}

struct LaunchShape {
  dim3 grid;
  uint32_t threads;       // per block
  size_t shared = 0;      // dynamic shared memory, bytes
  uint32_t cluster = 1;   // blocks of a cluster, along grid.x
};

// Starts `kernel` and returns a status. The arguments are converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
routegrad_status launch(void (*kernel)(Parameters...), const LaunchShape& shape, routegrad_stream stream,
                        Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (shape.shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (error == cudaSuccess) return ROUTEGRAD_OK;
  (void)cudaGetLastError();  // a refused launch must not be blamed on the next one
  return ROUTEGRAD_CUDA_ERROR | static_cast<int32_t>(error) << 8;
#else
  (void)stream;
  auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return sim::launch({shape.grid, shape.threads, shape.shared, shape.cluster},
                     [](void* captured) { (*static_cast<decltype(body)*>(captured))(); }, &body);
#endif
}

}  // namespace ROUTEGRAD_VARIANT
