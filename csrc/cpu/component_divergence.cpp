#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/pack.h"
#include "cpu/sweep/scale.h"
#include "cpu/system/memory.h"
#include "cpu/widened.h"

namespace csdiv::cpu {
namespace {

constexpr double kLog4Pi = 2.5310242469692907930;
constexpr float kSteep = -20, kWide = 60;   // log variances, out of which a float gradient may leave its range

// Log variances that are exponentiated at most: equation (10).
template <class T>
constexpr T kCap = sizeof(T) == 4 ? T(85) : T(700);

// Components of p as distributions of their own: p is given their variances, and a scale exponent for each, for as long
// as this lives.
template <class T>
class OwnTerms {
 public:
  OwnTerms(Problem<T>& problem, bool logarithms)
      : dim_(problem.dim),
        given_(problem.p.variances),
        logarithms_(logarithms),
        variances_(logarithms ? problem.p.batch * problem.p.n * problem.dim : 0),
        own_(problem.p.batch * problem.p.n),
        exponents_(own_.size()) {
    if (logarithms) {
      tile_kernels<T>().exponentials(given_, variances_.size(), kCap<T>, variances_.get());
      problem.p.variances = variances_.get();
    }
    for (int64_t row = 0; row < own_.size(); ++row) {
      const double log_scale = logarithms ? read_logarithms(row) : read_variances(row);
      const double exponent = double(dim_) + log_scale / kLog2;
      exponents_.get()[row] = std::isfinite(exponent) ? 2 * std::llround(0.5 * exponent) : 0;
    }
    problem.p.scale_exponents = exponents_.get();
    problem.p.exponent_period = 1;
  }

  // -sum_d log(s_d) / 4 of a component, counted over all items, and what is to be added to -row_lse.
  double operator[](int64_t row) const { return own_.get()[row]; }

  // From gradients of sum factor row_lse to those of sum (own - row_lse) upstream, where upstream is that of each row;
  // rows that are silent have none.
  void finish(const SideGradients<T>& grads, T factor, const double* upstream, const char* silent = nullptr) const {
    for (int64_t k = 0; grads.means && k < own_.size() * dim_; ++k) grads.means[k] *= factor;
    for (int64_t row = 0; grads.variances && row < own_.size(); ++row) {
      T* const grad = grads.variances + row * dim_;
      const T* const given = given_ + row * dim_;
      if (silent && silent[row]) {   // whatever the variances are
        std::fill_n(grad, dim_, T(0));
        continue;
      }
      const double quarter = std::isinf(own_.get()[row]) && !logarithms_ ? 0 : 0.25 * upstream[row];
      if (sizeof(T) == sizeof(float) && logarithms_) {   // neither capped nor zero: extremes are computed in double
        const T* const variances = variances_.get() + row * dim_;
        for (int64_t d = 0; d < dim_; ++d) grad[d] = factor * grad[d] * variances[d] - T(quarter);
        continue;
      }
      for (int64_t d = 0; d < dim_; ++d) {
        if (!logarithms_) {
          grad[d] = T(double(factor * grad[d]) - (quarter == 0 ? 0 : quarter / double(given[d])));
        } else if (given[d] > kCap<T>) {
          grad[d] = T(quarter);
        } else {
          const T variance = variances_.get()[row * dim_ + d];
          grad[d] = T((variance == 0 ? 0 : double(factor * grad[d] * variance)) - quarter);
        }
      }
    }
  }

 private:
  // The sum of the logarithms of variances; own terms are stored.
  double read_logarithms(int64_t row) {
    const T* const logs = given_ + row * dim_;
    double sums[4] = {}, excess = 0;
    int64_t d = 0;
    for (; d + 4 <= dim_; d += 4)
      for (int k = 0; k < 4; ++k) sums[k] += double(std::min(logs[d + k], kCap<T>));
    for (; d < dim_; ++d) sums[0] += double(std::min(logs[d], kCap<T>));
    const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (sum > 0 || std::isnan(sum))
      for (d = 0; d < dim_; ++d) excess += std::max(double(logs[d]) - double(kCap<T>), 0.0);
    own_.get()[row] = 0.25 * (excess - sum);
    return sum;
  }

  double read_variances(int64_t row) {
    constexpr int64_t kFactors = 512;   // whose product is a normal number
    double sum = 0, mantissa = 1;
    int64_t exponents = 0, zeros = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      const double variance = double(given_[row * dim_ + d]);
      int exponent = 0;
      if (variance == 0)
        ++zeros;
      else
        mantissa *= std::frexp(variance < 0 ? NAN : variance, &exponent);
      exponents += exponent;
      if (d % kFactors != kFactors - 1) continue;
      sum += std::log(mantissa);
      mantissa = 1;
    }
    sum += std::log(mantissa) + kLog2 * double(exponents);
    own_.get()[row] = zeros ? INFINITY : -0.25 * sum;
    return sum;
  }

  const int64_t dim_;
  const T* const given_;
  const bool logarithms_;
  const AlignedArray<T> variances_;
  const AlignedArray<double> own_;
  const AlignedArray<int64_t> exponents_;
};

// What a call has in either precision.
template <class T>
struct Scaled {
  Scaled(Problem<T>& problem, bool logarithms, int threads)
      : own(problem, logarithms), q(problem.dim, problem.q, threads), precisions(problem) {}

  OwnTerms<T> own;
  ScaleExponents<T> q;
  RowPrecisions<T> precisions;
};

bool are_extreme(const Problem<float>& problem) {
  const float* const logs = problem.p.variances;
  bool within = true;
  for (int64_t k = 0; k < problem.p.batch * problem.p.n * problem.dim; ++k)
    within &= logs[k] >= kSteep && logs[k] <= kWide;
  return !within;
}

// log V(q, q) of each item less what self_overlap_forward gives.
template <class T>
AlignedArray<double> self_offsets(const Problem<T>& problem) {
  Problem<T> self{problem.q.batch, problem.dim, problem.q, problem.q};
  self.p.index = self.q.index = nullptr;
  AlignedArray<double> found(self.batch);
  offsets(self, Uniform::kOfBoth, found.get());
  return found;
}

// log V(q, q) for each problem, and the gradients of its sum times `factor` to q, added.
template <class T>
void self_terms(const Problem<T>& problem, T factor, double* values, const SideGradients<T>& grad_q, int threads) {
  const AlignedArray<double> found(problem.q.batch), left_out = self_offsets(problem);
  self_overlap_forward(problem.dim, problem.q, factor, found.get(), grad_q.added_to(), threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t item = problem.q.item(b);
    values[b] = found.get()[item] + left_out.get()[item];
  }
}

template <class T>
void self_gradients(const Problem<T>& problem, const double* half_sums, const double* values,
                    const SideGradients<T>& grad_q, int threads) {
  const AlignedArray<T> upstream = filled(problem.q.batch, T(0));
  const AlignedArray<double> relative(problem.q.batch), left_out = self_offsets(problem);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t item = problem.q.item(b);
    upstream.get()[item] += T(half_sums[b]);
    relative.get()[item] = values[b] - left_out.get()[item];
  }
  self_overlap_backward(problem.dim, problem.q, upstream.get(), relative.get(), grad_q.added_to(), threads);
}

template <class T>
void negate(T* numbers, int64_t size) {
  for (int64_t k = 0; numbers && k < size; ++k) numbers[k] = -numbers[k];
}

}   // namespace

template <class T>
void component_divergence_forward(Problem<T> problem, bool logarithms, const double* known, T* values, T* row_lse,
                                  double* self_overlaps, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                                  double* grad_known, int threads) {
  const int64_t n = problem.p.n, dim = problem.dim;
  if constexpr (std::is_same_v<T, float>) {
    if (logarithms && are_extreme(problem)) {
      const WidenedSide p(problem.p, dim, grad_p), q(problem.q, dim, grad_q);
      const AlignedArray<double> wide_values(problem.rows()), wide_row_lse(problem.rows());
      component_divergence_forward<double>({problem.batch, dim, p.mixture(), q.mixture()}, true, known,
                                           wide_values.get(), wide_row_lse.get(), self_overlaps, p.grads(), q.grads(),
                                           grad_known, threads);
      narrow(wide_values, values);
      narrow(wide_row_lse, row_lse);
      p.write_grads();
      return q.write_grads();
    }
  }
  const Scaled<T> scaled(problem, logarithms, threads);
  overlap_lse_forward(problem, row_lse, grad_p, grad_q, threads);

  const double half = 0.5 * double(n);
  if (grad_p.wanted()) {
    const double uses = double(problem.batch) / double(std::max(problem.p.batch, int64_t(1)));
    scaled.own.finish(grad_p, T(-1), filled(problem.p.batch * n, uses).get());
  }
  negate(grad_q.means, problem.q.batch * problem.q.n * dim);
  negate(grad_q.variances, problem.q.batch * problem.q.n * dim);
  negate(grad_q.log_weights, problem.q.batch * problem.q.n);
  if (known)
    std::copy_n(known, problem.batch, self_overlaps);
  else
    self_terms(problem, T(half * double(problem.batch) / double(std::max(problem.q.batch, int64_t(1)))), self_overlaps,
               grad_q, threads);
  if (grad_known) std::fill_n(grad_known, problem.batch, half);

  if (n == 0) return;
  const AlignedArray<double> of_first_rows(problem.batch);
  offsets(problem, Uniform::kOfQ, of_first_rows.get());
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t* const exponents = problem.p.scale_exponents + problem.p.item(b) * n;
    const double self = 0.5 * self_overlaps[b] - 0.25 * double(dim) * kLog4Pi;
    for (int64_t i = 0; i < n; ++i) {
      const double left_out = of_first_rows.get()[b] - 0.25 * kLog2 * double(exponents[i] - exponents[0]);
      values[b * n + i] = T(scaled.own[problem.p.item(b) * n + i] + self - (double(row_lse[b * n + i]) + left_out));
    }
  }
}

template <class T>
void component_divergence_backward(Problem<T> problem, bool logarithms, const double* known, const T* grad_values,
                                   const T* row_lse, const double* self_overlaps, const SideGradients<T>& grad_p,
                                   const SideGradients<T>& grad_q, double* grad_known, int threads) {
  const int64_t n = problem.p.n, dim = problem.dim;
  if constexpr (std::is_same_v<T, float>) {
    if (logarithms && are_extreme(problem)) {
      const WidenedSide p(problem.p, dim, grad_p), q(problem.q, dim, grad_q);
      component_divergence_backward<double>(
          {problem.batch, dim, p.mixture(), q.mixture()}, true, known, widened(grad_values, problem.rows()).get(),
          widened(row_lse, problem.rows()).get(), self_overlaps, p.grads(), q.grads(), grad_known, threads);
      p.write_grads();
      return q.write_grads();
    }
  }
  const Scaled<T> scaled(problem, logarithms, threads);
  const AlignedArray<T> minus(problem.rows());
  const AlignedArray<double> upstream = filled(problem.p.batch * n, 0.0), half_sums = filled(problem.batch, 0.0);
  const AlignedArray<char> silent = filled(problem.p.batch * n, char(true));
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const double grad = double(grad_values[b * n + i]);
      silent.get()[problem.p.item(b) * n + i] &= grad == 0;
      minus.get()[b * n + i] = T(-grad);
      upstream.get()[problem.p.item(b) * n + i] += grad;
      half_sums.get()[b] += 0.5 * grad;
    }
  }
  overlap_lse_backward(problem, minus.get(), row_lse, grad_p, grad_q, threads);
  if (grad_p.wanted()) scaled.own.finish(grad_p, T(1), upstream.get(), silent.get());
  if (grad_known) std::copy_n(half_sums.get(), problem.batch, grad_known);
  if (!known && grad_q.wanted()) self_gradients(problem, half_sums.get(), self_overlaps, grad_q, threads);
}

CSDIV_INSTANTIATE(component_divergence_forward);
CSDIV_INSTANTIATE(component_divergence_backward);

}   // namespace csdiv::cpu
