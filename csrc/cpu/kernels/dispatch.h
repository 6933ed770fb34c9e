// Picks the kernels at run time.
#pragma once

#include <string>
#include <vector>

#include "full_tile.h"
#include "tile.h"

namespace csdiv::cpu {

template <class T>
const TileKernels<T>& tile_kernels();
const FullKernels& full_kernels();

std::vector<std::string> compiled_isas();   // widest last
std::string current_isa();
void set_isa(const std::string& name);   // throws std::invalid_argument unless compiled in and supported here

}   // namespace csdiv::cpu
