#include "gradient_sweep.h"
#include "pack.h"
#include "totals.h"

namespace csdiv::cuda {
namespace {

// Equation (6): a pair j > i counts for both of its components at once; the pair (i, i) once as a row, once as a
// column.
template <class T>
void gradients(Context& context, const Problem<T>& problem, const T* grad_values, const double* values,
               const SideGradients<T>& grad) {
  if (!grad.wanted()) return;
  GradientTasks<T> tasks{{{problem, true, Weights::kOfTotal, nullptr, nullptr, values}}, 1};
  sweep_gradients(context, tasks);
  const GradientSources<T> sources{{{tasks.tasks[0].row_sums, true, false, 1, grad_values},
                                    {tasks.tasks[0].column_sums, false, false, 1, grad_values}},
                                   2};
  GradientWrites<T> writes{{}, 0, problem.batch, problem.dim};
  writes.add(problem.p, sources, grad);
  write_gradients(context, writes);
}

}   // namespace

template <class T>
void self_overlap_forward(Context& context, Problem<T> problem, double* values, const SideGradients<T>& grad) {
  pack(context, problem);
  RowTasks<T> tasks{{{problem, true}}, 1};
  sum_rows(context, tasks);
  total_rows(context, tasks, Totals<T>{nullptr, values});
  gradients<T>(context, problem, nullptr, values, grad);
}

template <class T>
void self_overlap_backward(Context& context, Problem<T> problem, const T* grad_values, const double* values,
                           const SideGradients<T>& grad) {
  pack(context, problem);
  gradients(context, problem, grad_values, values, grad);
}

CSDIV_INSTANTIATE(self_overlap_forward);
CSDIV_INSTANTIATE(self_overlap_backward);

}   // namespace csdiv::cuda
