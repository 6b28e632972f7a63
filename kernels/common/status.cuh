// How a launcher refuses an argument: a status that carries the reason and the argument's place in its declaration.
//
//   REQUIRE(grouped_gemm, n, n > 0, ROUTEGRAD_OUT_OF_RANGE);
//   REQUIRE_POINTER(grouped_gemm, a);
//   REQUIRE_MULTIPLE_OF_8(grouped_gemm, n);
#pragma once
#include <stdint.h>

#include "../routegrad.h"

namespace ROUTEGRAD_VARIANT {

// The parameter lists as text: `grouped_gemm_parameters` is "(void* out, ...)".
#define ROUTEGRAD_PARAMETER_TEXT(name, parameters) inline constexpr const char name##_parameters[] = #parameters;
ROUTEGRAD_LAUNCHERS(ROUTEGRAD_PARAMETER_TEXT)
#undef ROUTEGRAD_PARAMETER_TEXT

constexpr bool is_name_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// 1-based place of the parameter called `argument` in `parameters`; not a constant, so an error, when there is none.
consteval int argument_place(const char* parameters, const char* argument) {
  int place = 1;
  for (int i = 0;; ++i) {
    const char c = parameters[i];
    if (c == ',' || c == ')') {
      // The name is the last word before the comma.
      int first = i;
      while (is_name_character(parameters[first - 1])) --first;
      int length = 0;
      while (argument[length] && first + length < i && parameters[first + length] == argument[length]) ++length;
      if (!argument[length] && first + length == i) return place;
      if (c == ')') throw "the launcher has no argument of this name";
      ++place;
    }
  }
}

constexpr routegrad_status refused(routegrad_reason reason, int place) { return reason | place << 8; }

}  // namespace ROUTEGRAD_VARIANT

#define REQUIRE(launcher, argument, condition, reason)                                                        \
  do {                                                                                                        \
    if (!(condition))                                                                                         \
      return ::ROUTEGRAD_VARIANT::refused(reason, ::ROUTEGRAD_VARIANT::argument_place(launcher##_parameters, #argument)); \
  } while (0)
#define REQUIRE_POINTER(launcher, argument)                            \
  do {                                                                 \
    REQUIRE(launcher, argument, (argument) != nullptr, ROUTEGRAD_NULL_POINTER); \
    REQUIRE(launcher, argument, reinterpret_cast<uintptr_t>(argument) % 16 == 0, ROUTEGRAD_MISALIGNED); \
  } while (0)
#define REQUIRE_MULTIPLE_OF_8(launcher, argument) REQUIRE(launcher, argument, (argument) % 8 == 0, ROUTEGRAD_NOT_MULTIPLE)
