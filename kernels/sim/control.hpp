// What the launcher table (common/table.cu) reads of the simulator.
#pragma once
#include <string>

#include "../routegrad.h"

namespace sim {

const std::string& last_failure();      // of the calling host thread's last launch; empty when it went well
const std::string& last_map_failure();  // why a tensor map was refused
routegrad_sim_counters take_counters();

}  // namespace sim
