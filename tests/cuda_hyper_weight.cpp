// The layout of csrc/cuda/hyper_weight.h for the tests: what the launcher computes, through ctypes.
#include <cstring>
#include <exception>

#include "../csrc/cuda/hyper_weight.h"

namespace hyper = fastprune::cuda::hyper;

namespace {

// As HyperSlice of csrc/hyper_weight.h, which needs PyTorch's headers.
struct Slice {
  int64_t size, filters, filter_rows, taps, out_channels, in_channels;
  bool by_tap;
};

}  // namespace

extern "C" {

int32_t threads() { return hyper::kThreads; }
int32_t places() { return hyper::kPlaces; }

// Writes the geometry, a kernel parameter, and the numbers of tiles, the backward's blocks in x and y, slots,
// columns of a slot and places of a tile; returns the geometry's size, or 0 with a message in `error` (of 256
// bytes).
int64_t geometry(const int64_t* sizes, bool by_tap, int64_t element_size, bool aligned, void* to,
                 int64_t* numbers, char* error) {
  const Slice slice{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], by_tap};
  try {
    const hyper::Geometry g = hyper::make_geometry(slice, element_size, aligned);
    std::memcpy(to, &g, sizeof(g));
    const int64_t width = fastprune::cuda::kVectorBytes / element_size;
    for (int64_t number : {g.tiles, g.grid().x, g.grid().y, g.slots(), g.columns(static_cast<int32_t>(width)),
                           g.tile_taps * g.pitch})
      *numbers++ = number;
    return sizeof(g);
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), 255);
    return 0;
  }
}

// n / divisor as the kernels compute it.
uint32_t divide(uint32_t n, int64_t divisor) {
  const hyper::Divisor by = hyper::divisor_of(divisor);
  return (static_cast<uint32_t>((uint64_t{n} * by.multiplier) >> 32) + n) >> by.shift;
}
}
