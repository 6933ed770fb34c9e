// Batches of tiny problems: a problem in each lane of a vector.
#pragma once

#include <vector>

#include "cpu/cpu.h"
#include "cpu/sweep/partition.h"

namespace csdiv::cpu {

template <class T>
bool is_tiny(const Problem<T>& problem);

// As cs_divergence_forward. Returns the problems that have no result yet: these are to be computed term by term.
template <class T>
std::vector<Part> tiny_divergence(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                                  const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

}   // namespace csdiv::cpu
