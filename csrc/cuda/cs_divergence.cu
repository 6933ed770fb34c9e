#include "gradient_sweep.h"
#include "pack.h"
#include "totals.h"

namespace csdiv::cuda {
namespace {

// A side with itself, one problem for each of its items if there are any that use them, on the scale of the pair.
template <class T>
Problem<T> with_itself(const Problem<T>& problem, const Mixture<T>& side) {
  return {problem.batch > 0 ? side.items : 0, problem.dim, side.alone(), side.alone(), problem.scale};
}

// The three terms in one launch; their sums are added up with the factors of D_CS.
template <class T>
void gradients(Context& context, const Problem<T>& problem, const T* grad_values, const double* overlaps,
               const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  if (!grad_p.wanted() && !grad_q.wanted()) return;
  GradientTasks<T> tasks{{{problem, false, Weights::kOfTotal, nullptr, nullptr, overlaps, 3}}, 1};
  tasks.tasks[0].rows_wanted = grad_p.wanted();
  tasks.tasks[0].columns_wanted = grad_q.wanted();
  const auto add_self_term = [&](const Mixture<T>& side, int term, const SideGradients<T>& wanted) {
    if (!wanted.wanted()) return 0;
    tasks.tasks[tasks.count] = {with_itself(problem, side),
                                true,
                                Weights::kOfTotal,
                                nullptr,
                                nullptr,
                                overlaps + term,
                                3,
                                side.index,
                                problem.batch};
    return tasks.count++;
  };
  const int pp = add_self_term(problem.p, 1, grad_p), qq = add_self_term(problem.q, 2, grad_q);
  sweep_gradients(context, tasks);
  const auto sources = [&](const ComponentSums& of_pair, bool of_rows, int term) {
    const GradientTask<T>& self = tasks.tasks[term];
    return GradientSources<T>{{{of_pair, of_rows, false, -1, grad_values},
                               {self.row_sums, true, true, 0.5, grad_values},
                               {self.column_sums, false, true, 0.5, grad_values}},
                              3};
  };
  GradientWrites<T> writes{{}, 0, problem.batch, problem.dim};
  writes.add(problem.p, sources(tasks.tasks[0].row_sums, true, pp), grad_p);
  writes.add(problem.q, sources(tasks.tasks[0].column_sums, false, qq), grad_q);
  write_gradients(context, writes);
}

}   // namespace

template <class T>
void cs_divergence_forward(Context& context, Problem<T> problem, T* values, T* row_lse, double* overlaps,
                           const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  RowTasks<T> tasks{
      {{problem, false}, {with_itself(problem, problem.p), true}, {with_itself(problem, problem.q), true}}, 3};
  sum_rows(context, tasks);
  total_rows(context, tasks, Totals<T>{row_lse, overlaps, values});
  gradients<T>(context, problem, nullptr, overlaps, grad_p, grad_q);
}

template <class T>
void cs_divergence_backward(Context& context, Problem<T> problem, const T* grad_values, const double* overlaps,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  gradients(context, problem, grad_values, overlaps, grad_p, grad_q);
}

CSDIV_INSTANTIATE(cs_divergence_forward);
CSDIV_INSTANTIATE(cs_divergence_backward);

}   // namespace csdiv::cuda
