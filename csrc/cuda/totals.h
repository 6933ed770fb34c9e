// log sum_i a_i exp(row_lse_i) over the rows of tasks: the scalars.
#pragma once

#include "row_sums.h"

namespace csdiv::cuda {

// What is to be written for each problem b; null: not.
template <class T>
struct Totals {
  T* row_lse = nullptr;       // (batch, n) of the first task
  double* values = nullptr;   // (batch, tasks), nothing left out
  T* divergences = nullptr;   // (batch) of three tasks pq, pp, qq
};

// The first task has the problems; the others are of their sides alone. One launch, or two if rows are many.
template <class T>
void total_rows(Context& context, const RowTasks<T>& tasks, const Totals<T>& totals);

}   // namespace csdiv::cuda
