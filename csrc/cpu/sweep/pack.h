// Components in the form that the tile kernels read.
#pragma once

#include <vector>

#include "cpu/kernels/tile.h"
#include "cpu/mixture.h"
#include "cpu/system/memory.h"

namespace csdiv::cpu {

template <class T>
int64_t num_row_tiles(const Problem<T>& problem) {
  return ceil_div(problem.p.n, kTileRows);
}

// The form in which a problem's tiles are computed, as far as they are certified.
template <class T>
Form form_of(const Problem<T>& problem);

template <class T>
RowTile<T> row_tile(const Problem<T>& problem, int64_t b, int64_t tile);

enum class LogWeights { kKept, kZero };
enum class Products { kNo, kYes };

// All items of q as stripes. A component of weight zero (log weight -inf) is neutral, whatever its parameters;
// one with a negative variance or a log weight of +inf is NaN.
template <class T>
class PackedColumns {
 public:
  // Packs all stripes. Products: whether equal pairs may differ by rounding, which then depends on the components
  // beside them.
  PackedColumns(const Problem<T>& problem, LogWeights log_weights, int threads, Products products = Products::kNo)
      : PackedColumns(problem, log_weights, products) {
    pack_all(problem, threads);
  }

  // Packs none.
  PackedColumns(const Problem<T>& problem, LogWeights log_weights, Products products);
  void pack_all(const Problem<T>& problem, int threads);
  bool has_all() const { return !all_.empty(); }

  int64_t width() const { return width_; }   // columns of a stripe, but for the last of an item
  int64_t stride() const { return stride_; }
  int64_t stripes() const { return stripes_; }   // of one item
  const Stripe<T>& stripe(int64_t item, int64_t s) const { return all_[item * stripes_ + s]; }

  // Stripe s of an item, in `memory` for stripe_size() numbers.
  Stripe<T> pack(const Problem<T>& problem, int64_t item, int64_t s, T* memory) const;
  int64_t stripe_size() const { return stripe_size_; }

  // The same of one that pack_all() has packed; else by pack(), for one after the other.
  Stripe<T> stripe(const Problem<T>& problem, int64_t item, int64_t s, T* memory) const {
    return has_all() ? stripe(item, s) : pack_in_turn(problem, item, s, memory);
  }
  AlignedArray<T> memory_of_stripe() const { return AlignedArray<T>(has_all() ? 0 : stripe_size_); }

 private:
  Stripe<T> pack_in_turn(const Problem<T>& problem, int64_t item, int64_t s, T* memory) const;
  void pack_components(const Mixture<T>& q, int64_t dim, int64_t item, int64_t s, T* means, Stripe<T>& stripe) const;
  void pack_precisions(const Problem<T>& problem, int64_t item, T* precisions, Stripe<T>& stripe) const;
  void pack_centered(int64_t dim, T* center, Stripe<T>& stripe) const;

  const LogWeights log_weights_;
  const Form form_;
  int64_t width_, stride_, stripes_;
  const int64_t precision_dims_;   // of tied rows, else 0
  const bool products_;
  const int64_t stripe_size_;
  AlignedArray<T> memory_;
  std::vector<Stripe<T>> all_;
};

// Gives the rows of a problem their precisions, for as long as this lives, where its form wants them.
template <class T>
class RowPrecisions {
 public:
  explicit RowPrecisions(Problem<T>& problem);

 private:
  AlignedArray<T> precisions_, log_determinants_;
};

}   // namespace csdiv::cpu
