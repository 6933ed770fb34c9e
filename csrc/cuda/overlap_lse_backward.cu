#include "gradient_sweep.h"
#include "pack.h"

namespace csdiv::cuda {

template <class T>
void sweep_pair(Context& context, GradientTasks<T>& tasks, const T* grad_values, const SideGradients<T>& grad_p,
                const SideGradients<T>& grad_q) {
  GradientTask<T>& task = tasks.tasks[0];
  task.rows_wanted = grad_p.wanted();
  task.columns_wanted = grad_q.wanted();
  if (!task.rows_wanted && !task.columns_wanted) return;
  sweep_gradients(context, tasks);
  const Problem<T>& problem = task.problem;
  const GradientSources<T> to_p{{{task.row_sums, true, false, 1, grad_values}}, 1};
  const GradientSources<T> to_q{{{task.column_sums, false, false, 1, grad_values}}, 1};
  GradientWrites<T> writes{{}, 0, problem.batch, problem.dim};
  writes.add(problem.p, to_p, grad_p);
  writes.add(problem.q, to_q, grad_q);
  write_gradients(context, writes);
}

template <class T>
void overlap_lse_backward(Context& context, Problem<T> problem, const T* grad_row_lse, const double* row_lse,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  GradientTasks<T> tasks{{{problem, false, Weights::kOfRows, row_lse, grad_row_lse}}, 1};
  sweep_pair<T>(context, tasks, nullptr, grad_p, grad_q);
}

CSDIV_INSTANTIATE(sweep_pair);
CSDIV_INSTANTIATE(overlap_lse_backward);

}   // namespace csdiv::cuda
