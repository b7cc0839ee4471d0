// Vectors of the instruction set being compiled. Not guarded: included in each FASTPRUNE_ISA half.

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <class E, int64_t N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};

template <class E>
constexpr int64_t lanes = FASTPRUNE_VECTOR_BYTES / static_cast<int64_t>(sizeof(E));

template <class E>
using Vector = typename VectorOf<E, lanes<E>>::type;

template <int64_t N, class T>
inline auto load_floats(const T* p) {
  using Floats = typename VectorOf<float, N>::type;
  using Words = typename VectorOf<uint32_t, N>::type;
  if constexpr (std::is_same_v<T, float>) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
  } else {
    typename VectorOf<uint16_t, N>::type halves;
    std::memcpy(&halves, p, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return reinterpret_cast<Floats>(bits << 16);
    } else {
      // The exponent is rebiased by a multiplication, which takes subnormals along; Inf and NaN get theirs
      // back.
      const Words magnitude = (bits & 0x7fffu) << 13;
      const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
      const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000u) & 0x7f800000u;
      return reinterpret_cast<Floats>(reinterpret_cast<Words>(scaled) | special | ((bits & 0x8000u) << 16));
    }
  }
}

// A vector of A, from as many consecutive T.
template <class A, class T>
inline Vector<A> load(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    Vector<A> x;
    std::memcpy(&x, p, sizeof x);
    return x;
  } else if constexpr (std::is_same_v<A, float>) {
    return load_floats<lanes<A>>(p);
  } else {
    return __builtin_convertvector(load_floats<lanes<A>>(p), Vector<A>);
  }
}

template <class A>
inline void store(A* p, const Vector<A>& x) {
  std::memcpy(p, &x, sizeof x);
}

template <class A>
inline Vector<A> absolute(const Vector<A>& x) {
  using Bits = Vector<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>>;
  constexpr auto kAllButSign = static_cast<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>>(-1) >> 1;
  return reinterpret_cast<Vector<A>>(reinterpret_cast<Bits>(x) & kAllButSign);
}

template <class A>
inline A horizontal_sum(const Vector<A>& x) {
  A values[lanes<A>];
  store<A>(values, x);
  for (int64_t half = lanes<A> / 2; half > 0; half /= 2)  // a tree: a chain would wait for every addition
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

// The lower (Offset 0) or upper (Offset lanes / 2) halves of a and b, their elements alternating.
template <class A, size_t Offset, size_t... I>
inline Vector<A> zip(const Vector<A>& a, const Vector<A>& b, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * sizeof...(I) + Offset)...);
#else
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b,
                           Vector<Index>{static_cast<Index>(I / 2 + (I % 2) * sizeof...(I) + Offset)...});
#endif
}

// Σ f(w[k]) in float64, in a fixed order.
template <class T, class F>
inline double sum_of(const T* w, int64_t size, const F& f) {
  constexpr int64_t kChains = 4, kStep = kChains * lanes<double>;  // chains hide the latency of an addition
  Vector<double> sums[kChains] = {};
  // Filters follow one another in memory; the hardware's prefetcher stops at pages.
  constexpr int64_t kAhead = 4096, kLine = 64;  // bytes
  int64_t k = 0;
  for (; k + kStep <= size; k += kStep) {
    for (int64_t byte = 0; byte < kStep * static_cast<int64_t>(sizeof(T)); byte += kLine)
      __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kAhead + byte);
    for (int64_t c = 0; c < kChains; ++c) sums[c] += f(load<double>(w + k + c * lanes<double>));
  }
  for (; k + lanes<double> <= size; k += lanes<double>) sums[0] += f(load<double>(w + k));
  double total = horizontal_sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < size; ++k) total += f(Vector<double>{static_cast<double>(w[k])})[0];
  return total;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
