#include "gradient_sweep.h"
#include "pack.h"

namespace csdiv::cuda {

template <class T>
void overlap_lse_backward(Context& context, Problem<T> problem, const double* rows, const T* grad_rows,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  pack(context, problem);
  GradientTasks<T> tasks{{{problem, false, Weights::kOfRows, rows, grad_rows}}, 1};
  sweep_pair<T>(context, tasks, nullptr, grad_p, grad_q);
}

template void overlap_lse_backward(Context&, Problem<float>, const double*, const float*, const SideGradients<float>&,
                                   const SideGradients<float>&);
template void overlap_lse_backward(Context&, Problem<double>, const double*, const double*,
                                   const SideGradients<double>&, const SideGradients<double>&);

}   // namespace csdiv::cuda
