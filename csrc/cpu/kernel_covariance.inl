// Covariance of the rows of every 2-D kernel slice W[o, i]. Not guarded, as simd.inl.
//
// The matrices are tiny (kh × kh), their number huge: `kSlices` of them are worked on side by side, one in
// each lane.

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <class A>
constexpr int64_t kSlices = 2 * lanes<A>;

// A block of slices of one filter: centred[y * kw + x][slice], rows less their means; unused slices are 0.
template <class A, class T>
void load_slices(const GramLayer& layer, const T* filter, int64_t channel, int64_t count, A* centred) {
  const int64_t kh = layer.sizes[1], kw = layer.sizes[2];
  for (int64_t y = 0; y < kh; ++y) {
    A mean[kSlices<A>] = {};
    for (int64_t x = 0; x < kw; ++x) {
      A* out = centred + (y * kw + x) * kSlices<A>;
      const T* in = filter + channel * layer.strides[0] + y * layer.strides[1] + x * layer.strides[2];
      for (int64_t s = 0; s < kSlices<A>; ++s)
        out[s] = s < count ? static_cast<A>(in[s * layer.strides[0]]) : A(0);
      for (int64_t s = 0; s < kSlices<A>; ++s) mean[s] += out[s];
    }
    for (int64_t x = 0; x < kw; ++x) {
      A* out = centred + (y * kw + x) * kSlices<A>;
      for (int64_t s = 0; s < kSlices<A>; ++s) out[s] -= mean[s] / static_cast<A>(kw);
    }
  }
}

// products[slice] = Σ_x centred[i][x] · centred[j][x]
template <class A>
inline void multiply_kernel_rows(const A* centred, int64_t kw, int64_t i, int64_t j, A* products) {
  std::fill_n(products, kSlices<A>, A(0));
  for (int64_t x = 0; x < kw; ++x) {
    const A *left = centred + (i * kw + x) * kSlices<A>, *right = centred + (j * kw + x) * kSlices<A>;
    for (int64_t s = 0; s < kSlices<A>; ++s) products[s] += left[s] * right[s];
  }
}

// Calls f(layer index, filter) for every filter that takes part and has kernels with more than one column.
template <class F>
void for_kernels(const std::vector<GramLayer>& layers, const F& f) {
  std::vector<std::pair<size_t, int32_t>> filters;
  for (size_t l = 0; l < layers.size(); ++l)
    if (layers[l].sizes[2] > 1)
      for (int32_t row : layers[l].rows) filters.emplace_back(l, row);
  torch::stable::parallel_for(0, static_cast<int64_t>(filters.size()), 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, filters[i].first, filters[i].second);
  });
}

template <class T, class A>
double kernel_covariance_penalty(const std::vector<GramLayer>& layers, bool diagonal) {
  int64_t filters = 0;
  for (const GramLayer& layer : layers) filters += layer.filters;
  std::vector<double> shares(filters);
  for_kernels(layers, [&](int64_t share, size_t l, int32_t row) {
    const GramLayer& layer = layers[l];
    const T* filter = static_cast<const T*>(layer.data) + row * layer.size;
    const int64_t kh = layer.sizes[1], kw = layer.sizes[2];
    thread_local std::vector<A> centred;
    centred.resize(kh * kw * kSlices<A>);
    double total = 0;
    for (int64_t channel = 0; channel < layer.sizes[0]; channel += kSlices<A>) {
      load_slices(layer, filter, channel, std::min(kSlices<A>, layer.sizes[0] - channel), centred.data());
      A sums[kSlices<A>] = {};
      for (int64_t i = 0; i < kh; ++i)
        for (int64_t j = diagonal ? i : i + 1; j < kh; ++j) {
          A products[kSlices<A>];
          multiply_kernel_rows(centred.data(), kw, i, j, products);
          for (int64_t s = 0; s < kSlices<A>; ++s) sums[s] += std::fabs(products[s]);
        }
      for (int64_t s = 0; s < kSlices<A>; ++s) total += static_cast<double>(sums[s]);
    }
    shares[share] = total / static_cast<double>(kw - 1);
  });
  return std::accumulate(shares.begin(), shares.end(), 0.0);
}

template <class T, class A>
void kernel_covariance_gradient(const std::vector<GramLayer>& layers, bool diagonal, double grad) {
  for (const GramLayer& layer : layers)
    if (layer.sizes[2] == 1) std::memset(layer.gradient, 0, layer.filters * layer.size * sizeof(T));
  for_kernels(layers, [&](int64_t, size_t l, int32_t row) {
    const GramLayer& layer = layers[l];
    const T* filter = static_cast<const T*>(layer.data) + row * layer.size;
    T* gradient = static_cast<T*>(layer.gradient) + row * layer.size;
    const int64_t kh = layer.sizes[1], kw = layer.sizes[2];
    const A scale = static_cast<A>(grad / static_cast<double>(kw - 1));
    thread_local std::vector<A> centred, slopes;
    centred.resize(kh * kw * kSlices<A>);
    for (int64_t channel = 0; channel < layer.sizes[0]; channel += kSlices<A>) {
      const int64_t count = std::min(kSlices<A>, layer.sizes[0] - channel);
      load_slices(layer, filter, channel, count, centred.data());
      slopes.assign(kh * kw * kSlices<A>, A(0));
      for (int64_t i = 0; i < kh; ++i)
        for (int64_t j = 0; j < kh; ++j) {
          if (i == j && !diagonal) continue;
          A signs[kSlices<A>];
          multiply_kernel_rows(centred.data(), kw, i, j, signs);
          const A weight = i == j ? 2 * scale : scale;
          for (int64_t s = 0; s < kSlices<A>; ++s)
            signs[s] = signs[s] > 0 ? weight : signs[s] < 0 ? -weight : A(0);
          for (int64_t x = 0; x < kw; ++x) {
            const A* other = centred.data() + (j * kw + x) * kSlices<A>;
            A* out = slopes.data() + (i * kw + x) * kSlices<A>;
            for (int64_t s = 0; s < kSlices<A>; ++s) out[s] += signs[s] * other[s];
          }
        }
      for (int64_t y = 0; y < kh; ++y)
        for (int64_t x = 0; x < kw; ++x) {
          T* out = gradient + channel * layer.strides[0] + y * layer.strides[1] + x * layer.strides[2];
          const A* in = slopes.data() + (y * kw + x) * kSlices<A>;
          for (int64_t s = 0; s < count; ++s) out[s * layer.strides[0]] = static_cast<T>(in[s]);
        }
    }
  });
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
