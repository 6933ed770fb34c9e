// The tile kernels of each instruction set that was compiled in.
#pragma once

#include "tile.h"

#define CSDIV_DECLARE_TILE_KERNELS(isa)   \
  namespace csdiv::cpu::isa {             \
  TileKernels<float> tile_kernels_f32();  \
  TileKernels<double> tile_kernels_f64(); \
  }

CSDIV_DECLARE_TILE_KERNELS(baseline)
#ifdef CSDIV_X86
CSDIV_DECLARE_TILE_KERNELS(avx2)
CSDIV_DECLARE_TILE_KERNELS(avx512)
#endif

#undef CSDIV_DECLARE_TILE_KERNELS
