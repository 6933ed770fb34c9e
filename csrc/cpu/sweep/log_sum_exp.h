// The sum of exponentials that partial sums are merged into, in float64 and in a fixed order.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace csdiv::cpu {

// The sum is exp(max) * sum where both are finite, and sum itself otherwise: infinity and NaN stay in it.
struct LogSumExp {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;

  void add(double other_max, double other_sum) {
    const double top = other_max > max ? other_max : max;
    sum = scaled(sum, max, top) + scaled(other_sum, other_max, top);
    max = top;
  }

  void add_one(double logit) {
    const bool finite = std::isfinite(logit);
    add(finite ? logit : max, finite ? 1.0 : std::exp(logit));
  }

  // A partial sum whose terms all have `log_scale` added; a sum that is 0, infinite or NaN stays so.
  void add_scaled(double other_max, double other_sum, double log_scale) {
    add(std::isfinite(other_max) ? other_max + log_scale : other_max, other_sum);
  }

  double value() const { return (std::isfinite(max) ? max : 0.0) + std::log(sum); }

 private:
  static double scaled(double sum, double from, double to) {
    return from == to || !std::isfinite(sum) ? sum : sum * std::exp(from - to);
  }
};

// Sums that several tasks make the parts of.
class PartialSums {
 public:
  PartialSums(int64_t sums, int64_t parts) : parts_(parts), all_(sums * parts) {}

  LogSumExp& at(int64_t sum, int64_t part) { return all_[sum * parts_ + part]; }

  // log of sums begin ... end - 1 together.
  double value(int64_t begin, int64_t end) const {
    LogSumExp total;
    for (int64_t k = begin * parts_; k < end * parts_; ++k) total.add(all_[k].max, all_[k].sum);
    return total.value();
  }

 private:
  int64_t parts_;
  std::vector<LogSumExp> all_;
};

}   // namespace csdiv::cpu
