// Rows of a layer that generates weights, a few at a time. Not guarded: included in each FASTPRUNE_ISA half.
#include "simd.inl"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Of each of as many vectors as one has elements, the sum of its elements.
template <class A>
inline Vector<A> sums_of(Vector<A>* vectors) {
  constexpr std::make_index_sequence<lanes<A>> all;
#pragma GCC unroll 4
  for (int64_t half = lanes<A> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i)
      vectors[i] = zip<A, 0>(vectors[i], vectors[i + half], all) +
                   zip<A, lanes<A> / 2>(vectors[i], vectors[i + half], all);
  return vectors[0];
}

// Σ_k row[k] · hidden[k] over the whole vectors, part by part.
template <class A, class T>
inline Vector<A> product_of(const T* row, const A* hidden, int64_t vectors) {
  Vector<A> sums[2] = {};  // so that additions wait less for each other
  for (int64_t v = 0; v < vectors; ++v)
    sums[v % 2] += load<A>(row + v * lanes<A>) * load<A>(hidden + v * lanes<A>);
  return sums[0] + sums[1];
}

// generate_rows, for rows of so many whole vectors; 0 stands for any number.
template <int64_t Vectors, class T, class A>
inline void generate_columns(const T* weight, const T* bias, const A* hidden, int64_t rows, int64_t size,
                             A* generated) {
  constexpr int64_t kTogether = lanes<A>;
  const int64_t vectors = Vectors ? Vectors : size / lanes<A>;
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) {
    Vector<A> products[kTogether];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTogether; ++i)
      products[i] = product_of<A>(weight + (r + i) * size, hidden, vectors);
    store<A>(generated + r, sums_of<A>(products) + load<A>(bias + r));
  }
  for (; r < rows; ++r)
    generated[r] =
        horizontal_sum<A>(product_of<A>(weight + r * size, hidden, vectors)) + static_cast<A>(bias[r]);
}

}  // namespace

// generated[r] = row r · hidden + bias[r], for `rows` rows of `size` elements that follow one another.
template <class T, class A>
void generate_rows(const T* weight, const T* bias, const A* hidden, int64_t rows, int64_t size,
                   A* generated) {
  const int64_t vectors = size / lanes<A>;
  const auto generate = [&](auto count) {
    generate_columns<count>(weight, bias, hidden, rows, size, generated);
  };
  if (vectors == 2)  // hidden layers of 32 and 64, in registers
    generate(std::integral_constant<int64_t, 2>{});
  else if (vectors == 4)
    generate(std::integral_constant<int64_t, 4>{});
  else if (vectors == 8)
    generate(std::integral_constant<int64_t, 8>{});
  else
    generate(std::integral_constant<int64_t, 0>{});
  for (int64_t k = vectors * lanes<A>; k < size; ++k)
    for (int64_t r = 0; r < rows; ++r) generated[r] += static_cast<A>(weight[r * size + k]) * hidden[k];
}

// differentiate_rows, for so many vectors of columns.
template <int64_t Vectors, class T, class A>
inline void differentiate_columns(const T* weight, const A* grad, const A* hidden, int64_t rows, int64_t size,
                                  T* grad_weight, double* grad_hidden) {
  constexpr int64_t kWidth = Vectors * lanes<A>;
  Vector<A> x[Vectors], sums[Vectors] = {};
  for (int64_t v = 0; v < Vectors; ++v) x[v] = load<A>(hidden + v * lanes<A>);
  for (int64_t r = 0; r < rows; ++r, weight += size, grad_weight += size) {
    A products[kWidth];
    for (int64_t v = 0; v < Vectors; ++v) {
      sums[v] += grad[r] * load<A>(weight + v * lanes<A>);
      store<A>(products + v * lanes<A>, grad[r] * x[v]);
    }
    for (int64_t i = 0; i < kWidth; ++i) grad_weight[i] = static_cast<T>(products[i]);
  }
  for (int64_t v = 0; v < Vectors; ++v)
    for (int64_t i = 0; i < lanes<A>; ++i) grad_hidden[v * lanes<A> + i] += static_cast<double>(sums[v][i]);
}

// grad_weight[r] = grad[r] · hidden, and grad_hidden += Σ_r grad[r] · row r, for `rows` rows: so few that the
// sum over them may be one in A.
template <class T, class A>
void differentiate_rows(const T* weight, const A* grad, const A* hidden, int64_t rows, int64_t size,
                        T* grad_weight, double* grad_hidden) {
  constexpr int64_t kVectors = std::max<int64_t>(32 / lanes<A>, 1), kWidth = kVectors * lanes<A>;
  int64_t k = 0;
  const auto next = [&](auto vectors, int64_t width) {
    differentiate_columns<vectors>(weight + k, grad, hidden + k, rows, size, grad_weight + k,
                                   grad_hidden + k);
    k += width;
  };
  while (k + kWidth <= size) next(std::integral_constant<int64_t, kVectors>{}, kWidth);
  while (k + lanes<A> <= size) next(std::integral_constant<int64_t, 1>{}, lanes<A>);
  for (; k < size; ++k)
    for (int64_t r = 0; r < rows; ++r) {
      grad_hidden[k] += static_cast<double>(grad[r] * static_cast<A>(weight[r * size + k]));
      grad_weight[r * size + k] = static_cast<T>(grad[r] * hidden[k]);
    }
}

}  // namespace fastprune::FASTPRUNE_ISA
