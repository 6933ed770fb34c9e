#include "pack.h"

namespace csdiv::cuda {
namespace {

constexpr int kSamples = 8;   // of each side, for the scale of a dimension

static_assert(kSamples * kFlagDims == kThreads);

template <class T>
struct PackShared {
  T means[kFlagDims][kTile + 1], variances[kFlagDims][kTile + 1];   // as they are given; no bank conflicts
  T log2_weights[kTile];
  T samples[2][kSamples][kFlagDims];   // log2 variances of p and of q
  T centers[kFlagDims];
  T mean_units[kFlagDims], variance_units[kFlagDims];   // 2^k and 4^k
};

// log2 of the k-th of some variances of an item, or of all where problems share the scale; infinite or NaN where it has
// no logarithm.
template <class T>
CSDIV_DEVICE T sample_log2_variance(const Problem<T>& problem, const Mixture<T>& side, int64_t item, int64_t d, int k) {
  const bool all = problem.scale.items == 1;
  const int64_t first = all ? 0 : item * side.n, count = all ? side.items * side.n : side.n;
  return count == 0 ? T(NAN) : log2(side.variances[(first + count * k / kSamples) * problem.dim + d]);
}

// log2 of what c = s + t is like in a dimension: of those sides whose samples have a mean.
template <class T>
CSDIV_DEVICE T log2_center(const PackShared<T>& shared, int d) {
  T means[2] = {};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int k = 0; k < kSamples; ++k) means[side] += shared.samples[side][k][d];
    means[side] /= kSamples;
  }
  const auto [p, q] = means;
  if (!isfinite(p) && !isfinite(q)) return 0;
  return 1 + (!isfinite(p) ? q : !isfinite(q) ? p : (p + q) / 2);
}

template <class T>
struct PackTasks {
  Problem<T> problems[2];
  int64_t blocks[2];
};

// One block for a tile of p or q.
template <class T>
__global__ void pack_kernel(const __grid_constant__ PackTasks<T> tasks) {
  CSDIV_SHARED(PackShared<T>, shared);
  const bool second = blockIdx.x >= tasks.blocks[0];
  const Problem<T>& problem = tasks.problems[second];
  const int64_t p_blocks = problem.p.items * problem.p.tiles();
  const int64_t of_problem = blockIdx.x - (second ? tasks.blocks[0] : 0);
  const bool of_q = of_problem >= p_blocks;
  const Mixture<T>& side = of_q ? problem.q : problem.p;
  const int64_t block = of_q ? of_problem - p_blocks : of_problem;   // item * tiles + tile
  const int64_t item = block / side.tiles(), first = block % side.tiles() * kTile;
  const int64_t dim = problem.dim, padded = padded_dim(dim);
  const int components = int(side.n - first < kTile ? side.n - first : kTile);
  const Scale<T>& scale = problem.scale;
  const int64_t scale_item = scale.item(item);
  // Some block of each scale's items keeps the scale: of q if p has no components.
  const bool keeps = of_q == (p_blocks == 0) && first == 0 && (scale.items > 1 || item == 0);

  for (int k = threadIdx.x; k < kTile; k += kThreads) {
    T weight = k < components ? T(0) : -T(INFINITY);
    if (side.log_weights && k < components) weight = side.log_weights[item * side.n + first + k] * T(kLog2E);
    side.log2_weights[block * kTile + k] = shared.log2_weights[k] = finite_weight(weight);
  }

  double reference = 0;
  for (int64_t begin = 0; begin < padded; begin += kFlagDims) {
    const int dims = int(padded - begin < kFlagDims ? padded - begin : kFlagDims);
    const int present = int(dim - begin < kFlagDims ? dim - begin : kFlagDims);
#pragma unroll 4
    for (int k = threadIdx.x / present, d = threadIdx.x % present; k < components;) {   // neighbours as in memory
      const int64_t at = (item * side.n + first + k) * dim + begin + d;
      shared.means[d][k] = side.means[at];
      shared.variances[d][k] = side.variances[at];
      k += kThreads / present, d += kThreads % present;
      if (d >= present) ++k, d -= present;
    }
    if (const int k = threadIdx.x / kFlagDims, d = threadIdx.x % kFlagDims; d < present) {
      shared.samples[0][k][d] = sample_log2_variance(problem, problem.p, item, begin + d, k);
      shared.samples[1][k][d] = sample_log2_variance(problem, problem.q, item, begin + d, k);
    }
    __syncthreads();
    if (int(threadIdx.x) < dims) {
      const int64_t at = scale_item * padded + begin + threadIdx.x;
      const T log2_c = int(threadIdx.x) < present ? log2_center(shared, threadIdx.x) : T(0);
      constexpr int kMost = Float<T>::kScaleExponentMax;
      const int k = -max(-kMost, min(kMost, int(rint(log2_c / 2))));
      const T center = rint((log2_c + 2 * k) * 1024) / 1024;   // so that sums of centers are exact
      shared.centers[threadIdx.x] = center;
      shared.mean_units[threadIdx.x] = ldexp(T(1), k);
      shared.variance_units[threadIdx.x] = ldexp(T(1), 2 * k);
      reference += double(center) - 2.0 * k;
      if (keeps) scale.exponents[at] = k, scale.centers[at] = center;
    }
    __syncthreads();
    if (keeps && int(threadIdx.x) < dims / kGroup) {
      T sum = 0;
      for (int g = 0; g < kGroup; ++g) sum += shared.centers[threadIdx.x * kGroup + g];
      scale.group_centers[(scale_item * padded + begin) / kGroup + threadIdx.x] = sum;
    }

    bool irregular = false, narrow = false;
    for (int e = threadIdx.x; e < dims * kTile; e += kThreads) {
      const int k = e % kTile, d = e / kTile;
      T mean = 0, variance = T(0.5);   // padding: delta = 0 and c = 1 in dimensions, anything in components
      if (d < present && counts(shared.log2_weights[k])) {
        mean = shared.means[d][k] * shared.mean_units[d];
        variance = shared.variances[d][k] * shared.variance_units[d];
        irregular |= !(variance >= 0 && variance <= Float<T>::kVarianceMax / 2);
        irregular |= !(fabs(mean) <= Float<T>::kDeltaMax / 2);
        narrow |= variance < Float<T>::kVarianceMin;
      }
      T* const values = side.values + (block * padded + begin + d) * (2 * kTile);
      values[k] = mean;
      values[kTile + k] = variance;
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

// Memory for a problem's packed sides and their scale; how many blocks fill it.
template <class T>
int64_t take(Context& context, Problem<T>& problem) {
  Mixture<T>&p = problem.p, &q = problem.q;
  const bool same = p.means == q.means && p.variances == q.variances && p.log_weights == q.log_weights && p.n == q.n &&
                    p.items == q.items;
  for (Mixture<T>* side : {&p, &q}) side->log_count = side->log_weights ? 0 : log(double(side->n));
  take(context, p, problem.dim);
  if (same)
    q.values = p.values, q.log2_weights = p.log2_weights, q.flags = p.flags;
  else
    take(context, q, problem.dim);
  Scale<T>& scale = problem.scale;
  scale.same_dims = p.same_dims && q.same_dims;
  scale.items = p.own(problem.batch) && q.own(problem.batch) ? problem.batch : 1;
  scale.exponents = context.take<int>(scale.items * padded_dim(problem.dim));
  scale.centers = context.take<T>(scale.items * padded_dim(problem.dim));
  scale.group_centers = context.take<T>(scale.items * padded_dim(problem.dim) / kGroup);
  scale.references = context.take<double>(scale.items);
  return p.items * p.tiles() + (same ? 0 : q.items * q.tiles());
}

}   // namespace

template <class T>
void pack(Context& context, Problem<T>& problem, Problem<T>* second) {
  PackTasks<T> tasks{};
  tasks.blocks[0] = take(context, problem);
  tasks.problems[0] = problem;
  if (second) tasks.blocks[1] = take(context, *second), tasks.problems[1] = *second;
  launch(context, tasks.blocks[0] + tasks.blocks[1], sizeof(PackShared<T>), pack_kernel<T>, tasks);
}

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_kernel<float>);
  if (error != cudaSuccess) cudaGetLastError();   // it is reported, and not to be found by somebody else
  return error;
}

CSDIV_INSTANTIATE(pack);

}   // namespace csdiv::cuda
