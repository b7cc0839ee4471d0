// Covariance and correlation of all layers, forward and backward. Not guarded, as simd.inl.

#include "gram.inl"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kScratch =
    int64_t(1) << 22;  // elements of packed weights at a time: they stay in the last-level cache

template <class A>
int64_t panels_of(int64_t n) {
  return ceil_div(n, kPanel<A>);
}

// The end of the longest run of layers from `begin` whose packed weights fit the scratch memory (one at
// least).
template <class A, class F>
size_t group_end(const std::vector<GramLayer>& layers, size_t begin, const F& packed_size) {
  size_t end = begin;
  int64_t total = 0;
  while (end < layers.size() && (end == begin || total + packed_size(layers[end]) <= kScratch))
    total += packed_size(layers[end++]);
  return end;
}

template <class A>
struct Aligned {
  A* data;
  explicit Aligned(int64_t n) : data(static_cast<A*>(::operator new(n * sizeof(A), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

// Mean, and for correlation 1/‖w − mean‖ (0 for a constant filter), of a filter; exact in two passes.
template <class A, class T>
RowScale<A> row_scale(const T* filter, int64_t size, bool correlation) {
  const double mean = sum_of(filter, size, [](auto x) { return x; }) / static_cast<double>(size);
  if (!correlation) return {static_cast<A>(mean), A(1)};
  const double squares = sum_of(filter, size, [](auto x) { return x * x; });
  const double centred = sum_of(filter, size, [mean](auto x) { return (x - mean) * (x - mean); });
  const bool constant = centred <= kConstantFilter * kConstantFilter * squares;
  return {static_cast<A>(mean), constant ? A(0) : static_cast<A>(1 / std::sqrt(centred))};
}

// One tile of the Gram matrix: its share of the penalty, and its coefficients written on both sides of the
// diagonal.
template <class A, class C>
double finish_tile(const GramLayer& layer, const A* sums, int64_t row0, int64_t column0, int64_t rows,
                   int64_t columns, bool correlation, bool diagonal, C* coefficients) {
  const bool whole = static_cast<int64_t>(layer.rows.size()) == layer.filters;
  double total = 0;
  C line[kPanel<A>];
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = sums + i * kPanel<A>;
    const int64_t first = row0 == column0 ? i : 0;
    if constexpr (std::is_same_v<C, int8_t>) {
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = first; j < columns; ++j) sum += std::fabs(row[j]);
      total += static_cast<double>(sum);
      for (int64_t j = 0; j < columns; ++j) line[j] = static_cast<C>((row[j] > 0) - (row[j] < 0));
    } else {
      std::copy_n(row, columns, line);
    }
    if (row0 == column0) {
      const bool counted = !correlation && diagonal;
      if (!counted && !correlation) total -= static_cast<double>(std::fabs(row[i]));
      line[i] = counted ? static_cast<C>(2 * line[i]) : C(0);
    }
    const int64_t filter = layer.rows[row0 + i];
    C* out = coefficients + filter * layer.filters;
    if (whole)
      std::copy(line + first, line + columns, out + column0 + first);
    else
      for (int64_t j = first; j < columns; ++j) out[layer.rows[column0 + j]] = line[j];
    for (int64_t j = first; j < columns; ++j)
      coefficients[layer.rows[column0 + j] * layer.filters + filter] = line[j];
  }
  return total;
}

// −Σ_j P_ij² onto the diagonal of a layer's coefficients; returns the sum of all squares.
template <class A>
double finish_correlation(const GramLayer& layer, A* coefficients) {
  double all = 0;
  for (int32_t row : layer.rows) {
    A* line = coefficients + row * layer.filters;
    const double squares = sum_of(line, layer.filters, [](auto x) { return x * x; });
    line[row] = static_cast<A>(-squares);
    all += squares;
  }
  return all;
}

// A row of signs as a covariance's coefficients, see ../decorrelation.h; bytes in little-endian order.
inline void pack_signs(const int8_t* signs, int64_t count, int32_t* words) {
  for (int64_t begin = 0; begin < count; begin += kEntriesPerWord) {
    uint64_t halves[2] = {};
    if (count - begin >= kEntriesPerWord)
      std::memcpy(halves, signs + begin, sizeof(halves));
    else
      std::memcpy(halves, signs + begin, count - begin);
    for (uint64_t& half : halves) {  // gathers the low two bits of each of eight bytes
      half &= 0x0303030303030303;
      half = (half | half >> 6) & 0x000F000F000F000F;
      half = (half | half >> 12) & 0x000000FF000000FF;
      half = (half | half >> 24) & 0xFFFF;
    }
    *words++ = static_cast<int32_t>(static_cast<uint32_t>(halves[0] | halves[1] << 16));
  }
}

// The place in `out` of coefficients [first, first + count) of a packed row; whole words are unpacked.
template <class A>
inline const A* unpack_signs(const int32_t* words, int64_t first, int64_t count, A* out) {
  const int64_t skipped = first % kEntriesPerWord;
  words += first / kEntriesPerWord;
  for (int64_t begin = 0; begin < skipped + count; begin += kEntriesPerWord) {
    const int32_t word = *words++;
#pragma omp simd
    for (int32_t i = 0; i < kEntriesPerWord; ++i) {
      const int32_t code = (word >> 2 * i) & 3;
      out[begin + i] = static_cast<A>(code - ((code + 1) & 4));
    }
  }
  return out + skipped;
}

struct PanelTask {
  size_t layer;
  int64_t row, column;  // panels
};

// C: int32_t for a covariance's packed signs, A for a correlation's coefficients.
template <class T, class A, class C>
double gram_penalty(const std::vector<GramLayer>& layers, bool correlation, bool diagonal, C* coefficients) {
  constexpr bool kPacked = std::is_same_v<C, int32_t>;
  const auto packed_size = [](const GramLayer& layer) {
    return panels_of<A>(static_cast<int64_t>(layer.rows.size())) * kPanel<A> * layer.size;
  };
  double penalty = 0;
  for (size_t begin = 0, end; begin < layers.size(); begin = end) {
    end = group_end<A>(layers, begin, packed_size);
    std::vector<PanelTask> packing, tiles;
    std::vector<int64_t> packed(1, 0);  // where each layer's panels start
    std::vector<std::vector<RowScale<A>>> scales;
    std::vector<std::vector<int8_t>> signs;  // [F, F] of each layer, before they are packed
    for (size_t l = begin; l < end; ++l) {
      const int64_t panels = panels_of<A>(static_cast<int64_t>(layers[l].rows.size()));
      if (kPacked) signs.emplace_back(layers[l].filters * layers[l].filters);
      for (int64_t i = 0; i < panels; ++i) {
        packing.push_back({l, i, 0});
        for (int64_t j = i; j < panels; ++j) tiles.push_back({l, i, j});
      }
      packed.push_back(packed.back() + packed_size(layers[l]));
      scales.emplace_back(layers[l].filters);
    }
    const Aligned<A> scratch(packed.back());
    const auto panel_of = [&](size_t l, int64_t panel) {
      return scratch.data + packed[l - begin] + panel * kPanel<A> * layers[l].size;
    };
    const auto count_in = [&](size_t l, int64_t panel) {
      return std::min(kPanel<A>, static_cast<int64_t>(layers[l].rows.size()) - panel * kPanel<A>);
    };

    for_tasks(static_cast<int64_t>(packing.size()), [&](int64_t task) {
      const auto [l, panel, _] = packing[task];
      const GramLayer& layer = layers[l];
      const T* weight = static_cast<const T*>(layer.data);
      const int32_t* rows = layer.rows.data() + panel * kPanel<A>;
      const int64_t count = count_in(l, panel);
      for (int64_t r = 0; r < count; ++r)
        scales[l - begin][rows[r]] = row_scale<A>(weight + rows[r] * layer.size, layer.size, correlation);
      pack_row_panel(weight, layer.size, rows, scales[l - begin].data(), count, panel_of(l, panel));
    });

    std::vector<double> shares(tiles.size());
    for_tasks(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
      const auto [l, i, j] = tiles[task];
      const auto finish = [&](const A* sums, auto* matrix) {
        return finish_tile(layers[l], sums, i * kPanel<A>, j * kPanel<A>, count_in(l, i), count_in(l, j),
                           correlation, diagonal, matrix);
      };
      alignas(64) A sums[kPanel<A> * kPanel<A>];
      multiply_panels(panel_of(l, i), panel_of(l, j), layers[l].size, count_in(l, i), count_in(l, j), sums);
      if constexpr (kPacked)
        shares[task] = finish(sums, signs[l - begin].data());
      else
        shares[task] = finish(sums, coefficients + layers[l].coefficients);
    });

    if constexpr (kPacked) {
      for_tasks(static_cast<int64_t>(packing.size()), [&](int64_t task) {
        const auto [l, panel, _] = packing[task];
        const int64_t filters = layers[l].filters;
        for (int64_t r = panel * kPanel<A>; r < panel * kPanel<A> + count_in(l, panel); ++r) {
          const int64_t row = layers[l].rows[r];
          pack_signs(signs[l - begin].data() + row * filters, filters,
                     coefficients + layers[l].coefficients + row * words_per_row(filters));
        }
      });
      for (size_t t = 0; t < tiles.size(); ++t)  // in the order of the tiles, whoever computed them
        penalty += shares[t] / static_cast<double>(std::max<int64_t>(layers[tiles[t].layer].size - 1, 1));
    } else {
      std::vector<double> squares(end - begin);
      for_tasks(static_cast<int64_t>(squares.size()), [&](int64_t l) {
        const GramLayer& layer = layers[begin + l];
        squares[l] = finish_correlation(layer, coefficients + layer.coefficients);
      });
      for (size_t l = begin; l < end; ++l)
        penalty +=
            std::sqrt(squares[l - begin]) / static_cast<double>(std::max<size_t>(layers[l].rows.size(), 1));
    }
  }
  return penalty;
}

// The factor of every row's gradient but 1/‖w − mean‖: 1/(K − 1), or 2 / (‖P − diag P‖_F · n) read off the
// diagonal.
template <class C>
double gradient_scale(const GramLayer& layer, const C* coefficients) {
  if constexpr (std::is_same_v<C, int32_t>) {
    return layer.size > 1 ? 1 / static_cast<double>(layer.size - 1) : 0;
  } else {
    double squares = 0;
    for (int32_t row : layer.rows) squares -= static_cast<double>(coefficients[row * layer.filters + row]);
    return squares > 0 ? 2 / (std::sqrt(squares) * static_cast<double>(layer.rows.size())) : 0;
  }
}

template <class T, class A, class C>
void gram_gradient(const std::vector<GramLayer>& layers, bool correlation, double grad,
                   const C* coefficients) {
  const auto packed_size = [](const GramLayer& layer) {
    return panels_of<A>(layer.size) * kPanel<A> * static_cast<int64_t>(layer.rows.size());
  };
  for (size_t begin = 0, end; begin < layers.size(); begin = end) {
    end = group_end<A>(layers, begin, packed_size);
    std::vector<PanelTask> blocks;  // a panel of rows
    std::vector<int64_t> packed(1, 0);
    std::vector<std::vector<RowScale<A>>> scales;
    for (size_t l = begin; l < end; ++l) {
      for (int64_t i = 0; i < panels_of<A>(static_cast<int64_t>(layers[l].rows.size())); ++i)
        blocks.push_back({l, i, 0});
      packed.push_back(packed.back() + packed_size(layers[l]));
      scales.emplace_back(layers[l].filters);
    }
    const Aligned<A> scratch(packed.back());
    const auto count_in = [&](size_t l, int64_t panel) {
      return std::min(kPanel<A>, static_cast<int64_t>(layers[l].rows.size()) - panel * kPanel<A>);
    };

    for_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [l, panel, _] = blocks[task];
      const GramLayer& layer = layers[l];
      const int64_t count = static_cast<int64_t>(layer.rows.size());
      for (int64_t r = panel * kPanel<A>; r < panel * kPanel<A> + count_in(l, panel); ++r) {
        const T* filter = static_cast<const T*>(layer.data) + layer.rows[r] * layer.size;
        RowScale<A>& scale = scales[l - begin][layer.rows[r]];
        scale = row_scale<A>(filter, layer.size, correlation);
        pack_column_panels(filter, layer.size, scale, r, count, scratch.data + packed[l - begin]);
      }
    });

    for_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [l, panel, _] = blocks[task];
      const GramLayer& layer = layers[l];
      const int64_t count = static_cast<int64_t>(layer.rows.size()), rows = count_in(l, panel);
      const C* matrix = coefficients + layer.coefficients;
      const int32_t* row = layer.rows.data() + panel * kPanel<A>;
      // The coefficients are symmetric: line j holds column j of this block's rows, which are among the
      // filters from `first` on.
      const int64_t first = row[0], range = row[rows - 1] + 1 - first;
      std::vector<A> unpacked(range + 2 * kEntriesPerWord);
      const Aligned<A> left(count * kPanel<A>);
      for (int64_t j = 0; j < count; ++j) {
        const A* line;
        if constexpr (std::is_same_v<C, int32_t>)
          line = unpack_signs(matrix + layer.rows[j] * words_per_row(layer.filters), first, range,
                              unpacked.data());
        else
          line = matrix + layer.rows[j] * layer.filters + first;
        A* out = left.data + j * kPanel<A>;
        if (range == rows)
          std::copy_n(line, rows, out);
        else
          for (int64_t i = 0; i < rows; ++i) out[i] = line[row[i] - first];
        std::fill(out + rows, out + kPanel<A>, A(0));
      }
      const double scale = grad * gradient_scale(layer, matrix);
      alignas(64) A sums[kPanel<A> * kPanel<A>];
      for (int64_t column = 0; column < layer.size; column += kPanel<A>) {
        const int64_t width = std::min(kPanel<A>, layer.size - column);
        multiply_panels(left.data, scratch.data + packed[l - begin] + column * count, count, rows, width,
                        sums);
        for (int64_t i = 0; i < rows; ++i) {
          const A factor = static_cast<A>(scale * static_cast<double>(scales[l - begin][row[i]].inverse));
          T* out = static_cast<T*>(layer.gradient) + row[i] * layer.size + column;
          for (int64_t c = 0; c < width; ++c) out[c] = static_cast<T>(factor * sums[i * kPanel<A> + c]);
        }
      }
    });
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
