// σ² of A = WᵀW − I by one power iteration: R = ‖b‖² / ‖a‖², a = A u, b = A a. Not guarded, as simd.inl.
//
// A is never formed: one pass over the filters applies it, each filter being read for w·x and, from the
// cache, for += (w·x) w. Vectors of K elements are float64 whatever the weights are: there are few of them.

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <class T>
inline double dot(const T* w, const double* x, int64_t size) {
  Vector<double> sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * lanes<double> <= size; k += 2 * lanes<double>)
    for (int64_t c = 0; c < 2; ++c)
      sums[c] += load<double>(w + k + c * lanes<double>) * load<double>(x + k + c * lanes<double>);
  double total = horizontal_sum<double>(sums[0] + sums[1]);
  for (; k < size; ++k) total += static_cast<double>(w[k]) * x[k];
  return total;
}

// out = A x = Wᵀ (W x) − x
template <class T>
void apply(const GramLayer& layer, const double* x, double* out) {
  for (int64_t k = 0; k < layer.size; ++k) out[k] = -x[k];
  for (int32_t row : layer.rows) {
    const T* w = static_cast<const T*>(layer.data) + row * layer.size;
    const double factor = dot(w, x, layer.size);
    for (int64_t k = 0; k < layer.size; ++k) out[k] += factor * static_cast<double>(w[k]);
  }
}

// The fixed start, in the order the elements have in memory.
inline std::vector<double> start_vector(const GramLayer& layer) {
  const double ratio = (std::sqrt(5.0) - 1) / 2;
  std::vector<double> u(layer.size);
  int64_t k = 0;
  for (int64_t c = 0; c < layer.sizes[0]; ++c)
    for (int64_t y = 0; y < layer.sizes[1]; ++y)
      for (int64_t x = 0; x < layer.sizes[2]; ++x) {
        const double step = static_cast<double>(++k) * ratio;
        u[c * layer.strides[0] + y * layer.strides[1] + x * layer.strides[2]] = step - std::floor(step) - 0.5;
      }
  return u;
}

template <class T, class A>
double orthogonality_penalty(const std::vector<GramLayer>& layers, A* coefficients) {
  std::vector<double> shares(layers.size());
  for_tasks(static_cast<int64_t>(layers.size()), [&](int64_t l) {
    const GramLayer& layer = layers[l];
    const std::vector<double> u = start_vector(layer);
    std::vector<double> a(layer.size), b(layer.size);
    apply<T>(layer, u.data(), a.data());
    apply<T>(layer, a.data(), b.data());
    const double aa = dot(a.data(), a.data(), layer.size);
    shares[l] = aa > 0 ? dot(b.data(), b.data(), layer.size) / aa : 0;
    for (int64_t k = 0; k < layer.size; ++k) {
      coefficients[layer.coefficients + k] = static_cast<A>(a[k]);
      coefficients[layer.coefficients + layer.size + k] = static_cast<A>(b[k]);
    }
  });
  return std::accumulate(shares.begin(), shares.end(), 0.0);
}

template <class T, class A>
void orthogonality_gradient(const std::vector<GramLayer>& layers, double grad, const A* coefficients) {
  for_tasks(static_cast<int64_t>(layers.size()), [&](int64_t l) {
    const GramLayer& layer = layers[l];
    const A* saved = coefficients + layer.coefficients;
    const std::vector<double> u = start_vector(layer), a(saved, saved + layer.size),
                              b(saved + layer.size, saved + 2 * layer.size);
    const double aa = dot(a.data(), a.data(), layer.size), bb = dot(b.data(), b.data(), layer.size);
    if (!(aa > 0)) {
      std::memset(layer.gradient, 0, layer.filters * layer.size * sizeof(T));
      return;
    }
    // From b = A a and a = A u: ∂R/∂b, then ∂R/∂a; every A applied, y = A x, adds W (∂y xᵀ + x ∂yᵀ) to ∂R/∂W.
    std::vector<double> db(layer.size), da(layer.size);
    for (int64_t k = 0; k < layer.size; ++k) db[k] = 2 * b[k] / aa;
    apply<T>(layer, db.data(), da.data());
    for (int64_t k = 0; k < layer.size; ++k) da[k] -= 2 * bb / (aa * aa) * a[k];
    for (int32_t row : layer.rows) {
      const T* w = static_cast<const T*>(layer.data) + row * layer.size;
      T* out = static_cast<T*>(layer.gradient) + row * layer.size;
      const double w_db = grad * dot(w, db.data(), layer.size), w_a = grad * dot(w, a.data(), layer.size);
      const double w_da = grad * dot(w, da.data(), layer.size), w_u = grad * dot(w, u.data(), layer.size);
      for (int64_t k = 0; k < layer.size; ++k)
        out[k] = static_cast<T>(static_cast<A>(w_db * a[k] + w_a * db[k] + w_da * u[k] + w_u * da[k]));
    }
  });
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
