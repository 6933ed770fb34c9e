// The tile kernels of each instruction set that was compiled in.
#pragma once

#include "full_tile.h"
#include "isas.h"   // from CMake
#include "tile.h"

#define CSDIV_DECLARE_TILE_KERNELS(isa)   \
  namespace csdiv::cpu::isa {             \
  TileKernels<float> tile_kernels_f32();  \
  TileKernels<double> tile_kernels_f64(); \
  FullKernels full_kernels();             \
  }
CSDIV_FOR_EACH_ISA(CSDIV_DECLARE_TILE_KERNELS)
#undef CSDIV_DECLARE_TILE_KERNELS
