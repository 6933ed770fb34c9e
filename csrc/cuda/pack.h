// Components in tiles that kernels read as they are: transposed, scaled by powers of two, padded, and certified.
#pragma once

#include "mixture.h"

namespace csdiv::cuda {

// Takes scratch memory for the packed sides and their scale, and fills it: of one problem or two, in one launch.
template <class T>
void pack(Context& context, Problem<T>& problem, Problem<T>* second = nullptr);

// Makes the current device load the module, so that no call has to.
cudaError_t load_kernels();

}   // namespace csdiv::cuda
