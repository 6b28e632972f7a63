// Options and their text form, as in ROUTEGRAD_SIM="copies=random,seed=7,order=shuffled,threads=2".
#include "options.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

namespace sim {

constexpr routegrad_sim_options kDefaults{ROUTEGRAD_SIM_LATE, ROUTEGRAD_SIM_LATE, ROUTEGRAD_SIM_FIFO, 1, 1, 1, 8, 90, 1};

struct Name {
  std::string_view text;
  int32_t value;
};
constexpr Name kAsyncNames[] = {{"early", ROUTEGRAD_SIM_EARLY}, {"late", ROUTEGRAD_SIM_LATE}, {"random", ROUTEGRAD_SIM_RANDOM}};
constexpr Name kOrderNames[] = {{"fifo", ROUTEGRAD_SIM_FIFO}, {"lifo", ROUTEGRAD_SIM_LIFO}, {"shuffled", ROUTEGRAD_SIM_SHUFFLED}};

template <size_t N>
static bool named(const Name (&names)[N], std::string_view text, int32_t& to) {
  for (const Name& n : names)
    if (n.text == text) return to = n.value, true;
  return false;
}

static bool number(std::string_view text, uint64_t& to) {
  const std::string copy(text);
  char* end = nullptr;
  to = strtoull(copy.c_str(), &end, 10);
  return !copy.empty() && !*end && copy[0] != '-';
}

static bool set(routegrad_sim_options& o, std::string_view key, std::string_view value) {
  if (key == "copies") return named(kAsyncNames, value, o.copies);
  if (key == "products") return named(kAsyncNames, value, o.products);
  if (key == "async") return named(kAsyncNames, value, o.copies) && named(kAsyncNames, value, o.products);
  if (key == "order") return named(kOrderNames, value, o.order);
  uint64_t n = 0;
  if (!number(value, n)) return false;
  if (key == "seed") return o.seed = n, true;
  int32_t* fields[] = {&o.threads, &o.resident, &o.poison, &o.multiprocessors, &o.arch};
  constexpr std::string_view keys[] = {"threads", "resident", "poison", "multiprocessors", "arch"};
  for (int i = 0; i < 5; ++i)
    if (key == keys[i]) return *fields[i] = static_cast<int32_t>(n < 1 << 20 ? n : 1 << 20), true;
  return false;
}

bool parse_options(const char* text, routegrad_sim_options& to, std::string& why) {
  routegrad_sim_options o = to;
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::string_view item = rest.substr(0, rest.find(','));
    rest.remove_prefix(item.size() == rest.size() ? item.size() : item.size() + 1);
    const size_t equals = item.find('=');
    if (equals == item.npos || !set(o, item.substr(0, equals), item.substr(equals + 1))) {
      why = "ROUTEGRAD_SIM: cannot read \"";
      why.append(item);
      why += "\"; expected copies|products|async=early|late|random, order=fifo|lifo|shuffled, or "
            "seed|threads|resident|poison|multiprocessors|arch=NUMBER, separated by commas";
      return false;
    }
  }
  if (!valid(o, why)) return false;
  to = o;
  return true;
}

bool valid(const routegrad_sim_options& o, std::string& why) {
  const auto between = [](int32_t x, int32_t low, int32_t high) { return low <= x && x <= high; };
  if (!between(o.copies, 0, 2) || !between(o.products, 0, 2) || !between(o.order, 0, 2))
    why = "simulator options: copies, products and order must be 0, 1 or 2";
  else if (!between(o.threads, 1, 256) || !between(o.resident, 1, 256) || !between(o.multiprocessors, 1, 1024))
    why = "simulator options: threads and resident must be 1 to 256, multiprocessors 1 to 1024";
  else if (!max_shared_of(o.arch))
    why = "simulator options: arch must be 80, 86, 89, 90, 100 or 120";
  else
    return true;
  return false;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
uint32_t max_shared_of(int32_t arch) {
  switch (arch) {
    case 80: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    case 90: case 100: return 227 << 10;
    default: return 0;
  }
}

// Options belong to the host thread that sets them, so that tests run side by side.
routegrad_sim_options& options() {
  static thread_local routegrad_sim_options current = [] {
    routegrad_sim_options o = kDefaults;
    std::string why;
    if (const char* text = getenv("ROUTEGRAD_SIM"); text && !parse_options(text, o, why)) options_fault() = why;
    return o;
  }();
  return current;
}

std::string& options_fault() {
  static thread_local std::string fault;
  return fault;
}

}  // namespace sim
