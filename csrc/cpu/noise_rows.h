// The noise of many samples. levels.h includes this file once for every instruction set, inside a namespace whose name
// carries it. The compiler vectorises shared/element.h, which has no branch: 5.5 ns a gaussian number with AVX-512, 10
// with AVX2, 14 with the baseline; 21 one by one.

// xi of `ids`, each as noise() of its first two Philox words.
__attribute__((flatten)) inline void noise_row(double* __restrict xi, const int64_t* ids, int64_t count,
                                               double half_range, uint32_t stream, const AdvantageOptions& options) {
  constexpr int64_t block = 256;
  uint32_t x0[block], x1[block];
  for (int64_t first = 0; first < count; first += block) {
    const int64_t n = count - first < block ? count - first : block;
    for (int64_t i = 0; i < n; ++i) {
      const Words words = philox4x32(options.seed, ids[first + i], stream, options.step);
      x0[i] = words.x0, x1[i] = words.x1;
    }
    if (options.distribution == Distribution::gaussian)
      for (int64_t i = 0; i < n; ++i) xi[first + i] = noise(true, half_range, x0[i], x1[i]);
    else
      for (int64_t i = 0; i < n; ++i) xi[first + i] = noise(false, half_range, x0[i], x1[i]);
  }
}

constexpr auto kKernels = &noise_row;
