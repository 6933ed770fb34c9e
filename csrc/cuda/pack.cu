#include "pack.h"

namespace csdiv::cuda {
namespace {

constexpr int kSamples = 8;   // of each side, for the scale of a dimension

template <class T>
struct PackShared {
  int exponents[kFlagDims];
  T centers[kFlagDims];
};

// Mean of log2 variance over some components of an item, or of all where problems share the scale; infinite or NaN
// where one of them has no logarithm.
template <class T>
CSDIV_DEVICE T mean_log2_variance(const Mixture<T>& side, int64_t item, bool all, int64_t dim, int64_t d) {
  const int64_t first = all ? 0 : item * side.n, count = all ? side.items * side.n : side.n;
  if (count == 0) return T(NAN);
  T sum = 0;
#pragma unroll
  for (int k = 0; k < kSamples; ++k) sum += log2(side.variances[(first + count * k / kSamples) * dim + d]);
  return sum / kSamples;
}

// log2 of what c = s + t is like in dimension d.
template <class T>
CSDIV_DEVICE T log2_center(const Problem<T>& problem, int64_t item, int64_t d) {
  const bool all = problem.scale.items == 1;
  const T p = mean_log2_variance(problem.p, problem.p.items == 1 ? 0 : item, all, problem.dim, d);
  const T q = mean_log2_variance(problem.q, problem.q.items == 1 ? 0 : item, all, problem.dim, d);
  if (!isfinite(p) && !isfinite(q)) return 0;
  return 1 + (!isfinite(p) ? q : !isfinite(q) ? p : (p + q) / 2);
}

// One block for a tile of p or q.
template <class T>
__global__ void pack_kernel(Problem<T> problem) {
  CSDIV_SHARED(PackShared<T>, shared);
  const int64_t p_blocks = problem.p.items * problem.p.tiles();
  const bool of_q = blockIdx.x >= p_blocks;
  const Mixture<T>& side = of_q ? problem.q : problem.p;
  const int64_t block = of_q ? blockIdx.x - p_blocks : blockIdx.x;   // item * tiles + tile
  const int64_t item = block / side.tiles(), first = block % side.tiles() * kTile;
  const int64_t dim = problem.dim, padded = padded_dim(dim);
  const Scale<T>& scale = problem.scale;
  const int64_t scale_item = scale.item(item);
  // Some block of each scale's items keeps the scale.
  const bool keeps = !of_q && first == 0 && (scale.items > 1 || item == 0);

  for (int64_t k = threadIdx.x; k < kTile; k += kThreads) {
    T weight = first + k < side.n ? T(0) : -T(INFINITY);
    if (side.log_weights && first + k < side.n) weight = side.log_weights[item * side.n + first + k] * T(kLog2E);
    side.log2_weights[block * kTile + k] = finite_weight(weight);
  }
  __syncthreads();

  double reference = 0;
  for (int64_t begin = 0; begin < padded; begin += kFlagDims) {
    const int dims = int(padded - begin < kFlagDims ? padded - begin : kFlagDims);
    if (int(threadIdx.x) < dims) {
      const int64_t d = begin + threadIdx.x;
      const T log2_c = d < dim ? log2_center(problem, item, d) : T(0);
      constexpr int kMost = Float<T>::kScaleExponentMax;
      const int k = -max(-kMost, min(kMost, int(rint(log2_c / 2))));
      const T center = rint((log2_c + 2 * k) * 1024) / 1024;   // so that sums of centers are exact
      shared.exponents[threadIdx.x] = k;
      shared.centers[threadIdx.x] = center;
      reference += double(center) - 2.0 * k;
      if (keeps) {
        scale.exponents[scale_item * padded + d] = k;
        scale.centers[scale_item * padded + d] = center;
      }
    }
    __syncthreads();
    if (keeps && int(threadIdx.x) < dims / kGroup) {
      T sum = 0;
      for (int g = 0; g < kGroup; ++g) sum += shared.centers[threadIdx.x * kGroup + g];
      scale.group_centers[(scale_item * padded + begin) / kGroup + threadIdx.x] = sum;
    }

    bool irregular = false, narrow = false;
    for (int e = threadIdx.x; e < dims * kTile; e += kThreads) {
      const int component = e % kTile;
      const int64_t d = begin + e / kTile, k = first + component;
      T mean = 0, variance = T(0.5);   // padding: delta = 0 and c = 1 in dimensions, anything in components
      if (d < dim && counts(side.log2_weights[block * kTile + component])) {
        const int exponent = shared.exponents[e / kTile];
        mean = ldexp(side.means[(item * side.n + k) * dim + d], exponent);
        variance = ldexp(side.variances[(item * side.n + k) * dim + d], 2 * exponent);
        irregular |= !(variance >= 0 && variance <= Float<T>::kVarianceMax / 2);
        irregular |= !(fabs(mean) <= Float<T>::kDeltaMax / 2);
        narrow |= variance < Float<T>::kVarianceMin;
      }
      T* const values = side.values + (block * padded + d) * (2 * kTile);
      values[component] = mean;
      values[kTile + component] = variance;
    }
    irregular = __syncthreads_or(irregular);
    narrow = __syncthreads_or(narrow);
    if (threadIdx.x == 0)
      side.flags[block * flags_per_tile(dim) + begin / kFlagDims] = irregular ? 0
                                                                    : narrow  ? kRegular
                                                                              : kRegular | kWide;
  }
  if (threadIdx.x < kWarp) {
    for (int step = kWarp / 2; step; step /= 2) reference += __shfl_xor_sync(~0u, reference, step);
    if (keeps && threadIdx.x == 0) scale.references[scale_item] = reference;
  }
}

template <class T>
void take(Context& context, Mixture<T>& side, int64_t dim) {
  const int64_t tiles = side.items * side.tiles();
  side.values = context.take<T>(tiles * padded_dim(dim) * 2 * kTile);
  side.log2_weights = context.take<T>(tiles * kTile);
  side.flags = context.take<uint8_t>(tiles * flags_per_tile(dim));
}

}   // namespace

template <class T>
void pack(Context& context, Problem<T>& problem) {
  const bool same = problem.p.means == problem.q.means && problem.p.variances == problem.q.variances &&
                    problem.p.log_weights == problem.q.log_weights && problem.p.n == problem.q.n &&
                    problem.p.items == problem.q.items;
  take(context, problem.p, problem.dim);
  if (same) {
    problem.q.values = problem.p.values;
    problem.q.log2_weights = problem.p.log2_weights;
    problem.q.flags = problem.p.flags;
  } else {
    take(context, problem.q, problem.dim);
  }
  Scale<T>& scale = problem.scale;
  scale.items = problem.p.own(problem.batch) && problem.q.own(problem.batch) ? problem.batch : 1;
  scale.exponents = context.take<int>(scale.items * padded_dim(problem.dim));
  scale.centers = context.take<T>(scale.items * padded_dim(problem.dim));
  scale.group_centers = context.take<T>(scale.items * padded_dim(problem.dim) / kGroup);
  scale.references = context.take<double>(scale.items);
  const int64_t p_blocks = problem.p.items * problem.p.tiles(), q_blocks = problem.q.items * problem.q.tiles();
  launch(context, p_blocks + (same ? 0 : q_blocks), sizeof(PackShared<T>), pack_kernel<T>, problem);
}

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_kernel<float>);
  if (error != cudaSuccess) cudaGetLastError();   // it is reported, and not to be found by somebody else
  return error;
}

CSDIV_INSTANTIATE(pack);

}   // namespace csdiv::cuda
