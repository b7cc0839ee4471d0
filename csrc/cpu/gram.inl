// Products of panels: the inner loop of the Gram matrix X Xᵀ and of (coefficients) X. Not guarded, as
// simd.inl.
//
// A panel is `kPanel` rows (or columns) interleaved, [depth][kPanel], so that the micro-kernel reads vectors
// of one panel against broadcast scalars of another and keeps its kRows × kPanel sums in registers.

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kVectors = 3;  // vectors a panel is wide
constexpr int64_t kRows = FASTPRUNE_VECTOR_BYTES == 64 ? 8 : FASTPRUNE_VECTOR_BYTES == 32 ? 4 : 3;
constexpr int64_t kDepth =
    128;  // steps between visits to the sums in memory: a panel's block stays in the L1 cache

template <class A>
constexpr int64_t kPanel = kVectors * lanes<A>;

// sums[i][j] += Σ_k left[k][i] · right[k][j] for kRows rows i and `Columns` vectors of j.
template <class A, int64_t Columns>
inline void multiply_rows(const A* left, const A* right, int64_t depth, A* sums) {
  Vector<A> registers[kRows][Columns];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int64_t j = 0; j < Columns; ++j) registers[i][j] = load<A>(sums + i * kPanel<A> + j * lanes<A>);
  for (int64_t k = 0; k < depth; ++k, left += kPanel<A>, right += kPanel<A>) {
    Vector<A> row[Columns];
#pragma GCC unroll 3
    for (int64_t j = 0; j < Columns; ++j) row[j] = load<A>(right + j * lanes<A>);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int64_t j = 0; j < Columns; ++j) registers[i][j] += left[i] * row[j];
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int64_t j = 0; j < Columns; ++j) store<A>(sums + i * kPanel<A> + j * lanes<A>, registers[i][j]);
}

// sums[kPanel][kPanel] = Σ_k left[k][i] · right[k][j]; only the first `rows` and `columns` are wanted.
template <class A>
inline void multiply_panels(const A* left, const A* right, int64_t depth, int64_t rows, int64_t columns,
                            A* sums) {
  std::fill_n(sums, kPanel<A> * kPanel<A>, A(0));
  const int64_t vectors = ceil_div(columns, lanes<A>);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = std::min(kDepth, depth - k);
    const A* right_block = right + k * kPanel<A>;
    for (int64_t i = 0; i < rows; i += kRows) {
      const A* left_block = left + k * kPanel<A> + i;
      A* block = sums + i * kPanel<A>;
      if (vectors == 1)
        multiply_rows<A, 1>(left_block, right_block, steps, block);
      else if (vectors == 2)
        multiply_rows<A, 2>(left_block, right_block, steps, block);
      else
        multiply_rows<A, 3>(left_block, right_block, steps, block);
    }
  }
}

// Transposes a square of vectors by log2(lanes) perfect shuffles.
template <class A>
inline void transpose(Vector<A>* rows) {
  constexpr int64_t n = lanes<A>;
  constexpr std::make_index_sequence<n> all;
  for (int64_t stage = 1; stage < n; stage *= 2) {
    Vector<A> shuffled[n];
#pragma GCC unroll 8
    for (int64_t i = 0; i < n / 2; ++i) {
      shuffled[2 * i] = zip<A, 0>(rows[i], rows[i + n / 2], all);
      shuffled[2 * i + 1] = zip<A, n / 2>(rows[i], rows[i + n / 2], all);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) rows[i] = shuffled[i];
  }
}

// The statistics that turn a filter w into its row x = (w − mean) · inverse.
template <class A>
struct RowScale {
  A mean, inverse;
};

// panel[k][r] = x_r[k] for the `count` filters in `rows`; zeros for the rest of the panel.
template <class A, class T>
inline void pack_row_panel(const T* weight, int64_t size, const int32_t* rows, const RowScale<A>* scales,
                           int64_t count, A* panel) {
  constexpr int64_t n = lanes<A>;
  for (int64_t group = 0; group < kPanel<A>; group += n) {
    const int64_t used = std::clamp<int64_t>(count - group, 0, n);
    int64_t k = 0;
    for (; k + n <= size; k += n) {
      Vector<A> square[n] = {};
      for (int64_t r = 0; r < used; ++r) {
        const auto [mean, inverse] = scales[rows[group + r]];
        square[r] = (load<A>(weight + rows[group + r] * size + k) - mean) * inverse;
      }
      transpose<A>(square);
      for (int64_t r = 0; r < n; ++r) store<A>(panel + (k + r) * kPanel<A> + group, square[r]);
    }
    for (; k < size; ++k)
      for (int64_t r = 0; r < n; ++r) {
        const bool there = r < used;
        const int32_t row = there ? rows[group + r] : 0;
        panel[k * kPanel<A> + group + r] =
            there ? (static_cast<A>(weight[row * size + k]) - scales[row].mean) * scales[row].inverse : A(0);
      }
  }
}

// panels[p][index][c] = x[p · kPanel + c]: one filter's row cut into the column panels of a layer with
// `count` rows.
template <class A, class T>
inline void pack_column_panels(const T* filter, int64_t size, const RowScale<A>& scale, int64_t index,
                               int64_t count, A* panels) {
  for (int64_t begin = 0; begin < size; begin += kPanel<A>) {
    A* out = panels + begin * count + index * kPanel<A>;
    const int64_t width = std::min(kPanel<A>, size - begin);
    int64_t c = 0;
    for (; c + lanes<A> <= width; c += lanes<A>)
      store<A>(out + c, (load<A>(filter + begin + c) - scale.mean) * scale.inverse);
    for (; c < width; ++c) out[c] = (static_cast<A>(filter[begin + c]) - scale.mean) * scale.inverse;
    for (; c < kPanel<A>; ++c) out[c] = 0;
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
