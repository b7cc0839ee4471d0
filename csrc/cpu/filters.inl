// What several ops do to a filter in memory. Not guarded: included in each FASTPRUNE_ISA half that needs it.
#include "simd.inl"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// scores[f] = mean |w| or mean w² of each of `filters` runs of `size` elements.
template <class T>
void score_filters(const T* weight, int64_t filters, int64_t size, int64_t ord, float* scores) {
  for (int64_t f = 0; f < filters; ++f, weight += size) {
    const double sum = ord == 1 ? sum_of(weight, size, [](auto x) { return absolute<double>(x); })
                                : sum_of(weight, size, [](auto x) { return x * x; });
    scores[f] = static_cast<float>(sum / static_cast<double>(size));
  }
}

// out[k] = scale · in[k], rounded once to Out.
template <class Out, class In>
void scale_row(const In* in, int64_t size, float scale, Out* out) {
  using A = std::conditional_t<std::is_same_v<In, double>, double, float>;
  for (int64_t k = 0; k < size; ++k)
    out[k] = static_cast<Out>(static_cast<std::conditional_t<std::is_same_v<Out, double>, double, float>>(
        static_cast<A>(in[k]) * static_cast<A>(scale)));
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
