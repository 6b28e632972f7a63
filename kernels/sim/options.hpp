// How the simulator runs (kernels/routegrad.h says what each field means).
#pragma once
#include <string>

#include "../routegrad.h"

namespace sim {

// Of the calling host thread. They start as ROUTEGRAD_SIM says; a text that cannot be read fails every launch with
// options_fault().
routegrad_sim_options& options();
std::string& options_fault();
bool parse_options(const char* text, routegrad_sim_options& to, std::string& why);
// Bytes of shared memory that a block may ask for; 0 for an architecture that is not known.
uint32_t max_shared_of(int32_t arch);
bool valid(const routegrad_sim_options& o, std::string& why);

}  // namespace sim
