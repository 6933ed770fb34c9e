// The best column of every row, online, and over the parts of a row.
#pragma once

#include "device.h"

namespace csdiv::cuda {

// The largest logit seen and where; NaN is larger than any other, and the lowest index wins.
template <class T>
struct Best {
  T logit = -T(INFINITY);
  int64_t index = INT64_MAX;

  CSDIV_DEVICE void add(T other, int64_t at) {
    const bool nan = isnan(logit), other_nan = isnan(other);
    const bool larger = other_nan ? !nan : other > logit;
    const bool equal = other_nan ? nan : other == logit;
    if (larger || (equal && at < index)) logit = other, index = at;
  }
};

// Of every row in each part of its columns: (problems, parts, n).
template <class T>
struct BestPartials {
  T* logits;
  int64_t* indices;
  int64_t parts;
};

// assignment[b, i] of all parts.
template <class T>
void combine_best(const Context& context, int64_t problems, int64_t n, const BestPartials<T>& partials,
                  int64_t* assignment);

}   // namespace csdiv::cuda
