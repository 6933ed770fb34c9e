#include "gradient_sweep.h"
#include "pack.h"
#include "totals.h"

namespace csdiv::cuda {
namespace {

template <class T>
void gradients(Context& context, const Problem<T>& problem, const T* grad_values, const double* values,
               const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  GradientTasks<T> tasks{{{problem, false, Weights::kOfTotal, nullptr, nullptr, values}}, 1};
  sweep_pair(context, tasks, grad_values, grad_p, grad_q);
}

}   // namespace

template <class T>
void log_overlap_forward(Context& context, Problem<T> problem, double* values, T* row_lse,
                         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  RowTasks<T> tasks{{{problem, false}}, 1};
  sum_rows(context, tasks);
  total_rows(context, tasks, Totals<T>{row_lse, values});
  gradients<T>(context, problem, nullptr, values, grad_p, grad_q);
}

template <class T>
void log_overlap_backward(Context& context, Problem<T> problem, const T* grad_values, const double* values,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  gradients(context, problem, grad_values, values, grad_p, grad_q);
}

CSDIV_INSTANTIATE(log_overlap_forward);
CSDIV_INSTANTIATE(log_overlap_backward);

}   // namespace csdiv::cuda
