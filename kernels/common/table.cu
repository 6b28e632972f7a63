// The launcher table of this build, and the texts of its statuses.
#include "simt.cuh"

#include <stdio.h>
#include <string.h>

#ifndef __CUDACC__
#include "../sim/control.hpp"
#include "../sim/options.hpp"
#endif

#define ROUTEGRAD_TEXT_OF(x) #x
#define ROUTEGRAD_TEXT(x) ROUTEGRAD_TEXT_OF(x)
#if defined(__CUDACC__)
#define ROUTEGRAD_BUILD_NAME "cuda"
#elif defined(ROUTEGRAD_SIM_VARIANT)
#define ROUTEGRAD_BUILD_NAME "sim-" ROUTEGRAD_TEXT(ROUTEGRAD_SIM_VARIANT)
#else
#define ROUTEGRAD_BUILD_NAME "sim"
#endif

namespace ROUTEGRAD_VARIANT {

#define ROUTEGRAD_DECLARE(name, parameters) routegrad_status name parameters;
ROUTEGRAD_LAUNCHERS(ROUTEGRAD_DECLARE)
#undef ROUTEGRAD_DECLARE

namespace {

const char* parameters_of(const char* launcher) {
#define ROUTEGRAD_COMPARE(name, parameters) \
  if (!strcmp(launcher, #name)) return name##_parameters;
  ROUTEGRAD_LAUNCHERS(ROUTEGRAD_COMPARE)
#undef ROUTEGRAD_COMPARE
  return nullptr;
}

// Copies the name of parameter number `place`, counted from 1.
void argument_name(const char* launcher, int place, char (&name)[64]) {
  snprintf(name, sizeof name, "number %d", place);
  const char* p = parameters_of(launcher);
  for (; p && *p; ++p) {
    if ((*p != ',' && *p != ')') || --place) continue;
    const char* first = p;
    while (is_name_character(first[-1])) --first;
    snprintf(name, sizeof name, "%.*s", static_cast<int>(p - first), first);
    return;
  }
}

void describe(const char* launcher, routegrad_status status, char* text, uint64_t capacity) {
  if (!text || !capacity) return;
  const int detail = status >> 8;
  char name[64];
  argument_name(launcher ? launcher : "", detail, name);
  switch (status & 0xff) {
    case ROUTEGRAD_OK: snprintf(text, capacity, "no error"); break;
    case ROUTEGRAD_NULL_POINTER: snprintf(text, capacity, "argument `%s` is a null pointer", name); break;
    case ROUTEGRAD_MISALIGNED: snprintf(text, capacity, "argument `%s` is not 16-byte aligned", name); break;
    case ROUTEGRAD_NOT_MULTIPLE: snprintf(text, capacity, "argument `%s` is not a multiple of 8", name); break;
    case ROUTEGRAD_OUT_OF_RANGE: snprintf(text, capacity, "argument `%s` is outside what the kernel can do", name); break;
    case ROUTEGRAD_OVERFLOW: snprintf(text, capacity, "argument `%s` makes a product of sizes overflow", name); break;
#ifdef __CUDACC__
    case ROUTEGRAD_CUDA_ERROR: {
      const cudaError_t error = static_cast<cudaError_t>(detail);
      snprintf(text, capacity, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
      break;
    }
    case ROUTEGRAD_BAD_TENSOR_MAP:
      snprintf(text, capacity, "the driver refused a TMA descriptor (or has no cuTensorMapEncodeTiled)");
      break;
#else
    case ROUTEGRAD_BAD_TENSOR_MAP: snprintf(text, capacity, "%s", sim::last_map_failure().c_str()); break;
    case ROUTEGRAD_SIM_FAILED: snprintf(text, capacity, "%s", sim::last_failure().c_str()); break;
#endif
    default: snprintf(text, capacity, "unknown status %d", status);
  }
}

#ifndef __CUDACC__
void get_options(routegrad_sim_options* options) { *options = sim::options(); }
routegrad_status set_options(const routegrad_sim_options* options) {
  std::string why;
  if (!sim::valid(*options, why)) return ROUTEGRAD_OUT_OF_RANGE | 1 << 8;
  sim::options() = *options;
  return ROUTEGRAD_OK;
}
void take_counters(routegrad_sim_counters* counters) { *counters = sim::take_counters(); }
#else
constexpr decltype(routegrad_launchers::sim_get_options) get_options = nullptr;
constexpr decltype(routegrad_launchers::sim_set_options) set_options = nullptr;
constexpr decltype(routegrad_launchers::sim_take_counters) take_counters = nullptr;
#endif

#define ROUTEGRAD_ADDRESS(name, parameters) name,
const routegrad_launchers table = {ROUTEGRAD_BUILD_NAME, describe,      get_options,
                                   set_options,          take_counters, ROUTEGRAD_LAUNCHERS(ROUTEGRAD_ADDRESS)};
#undef ROUTEGRAD_ADDRESS

}  // namespace
}  // namespace ROUTEGRAD_VARIANT

#ifdef __CUDACC__
extern "C" const routegrad_launchers* routegrad_cuda(void) { return &ROUTEGRAD_VARIANT::table; }
#else
extern "C" __attribute__((visibility("default"))) const routegrad_launchers* routegrad_sim(void) {
  return &ROUTEGRAD_VARIANT::table;
}
#endif
