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
void log_overlap_forward(Context& context, Problem<T> problem, T* rows, double* values, const SideGradients<T>& grad_p,
                         const SideGradients<T>& grad_q) {
  pack(context, problem);
  RowTasks<T> tasks{{{problem, false, {}, 0}}, 1};
  sum_rows(context, tasks);
  total_rows(context, tasks, Totals<T>{rows, values});
  gradients<T>(context, problem, nullptr, values, grad_p, grad_q);
}

template <class T>
void log_overlap_backward(Context& context, Problem<T> problem, const T* grad_values, const double* values,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  gradients(context, problem, grad_values, values, grad_p, grad_q);
}

template void log_overlap_forward(Context&, Problem<float>, float*, double*, const SideGradients<float>&,
                                  const SideGradients<float>&);
template void log_overlap_forward(Context&, Problem<double>, double*, double*, const SideGradients<double>&,
                                  const SideGradients<double>&);
template void log_overlap_backward(Context&, Problem<float>, const float*, const double*, const SideGradients<float>&,
                                   const SideGradients<float>&);
template void log_overlap_backward(Context&, Problem<double>, const double*, const double*,
                                   const SideGradients<double>&, const SideGradients<double>&);

}   // namespace csdiv::cuda
