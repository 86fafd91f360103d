// The AdamW step of a chunk of one tensor; the end of param_chunks.h.

#include "shared/adamw_element.h"

struct SquareRoot {
  double operator()(double x) const { return __builtin_sqrt(x); }
  inline __attribute__((always_inline)) Floats operator()(Floats x) const {
#if defined(__x86_64__) && REDIT_LANES == 16
    return (Floats)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__x86_64__) && REDIT_LANES == 8
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#else
    return (Floats)vsqrtq_f32((float32x4_t)x);
#endif
  }
};

// n elements of the weights, which are the parameter's or its master's, and in `out` the parameter where they are the
// master's.
template <class Type, class Grad>
void adamw_block(float* w, float* m, float* v, const typename Grad::Stored* g, typename Type::Stored* out, int64_t n,
                 const AdamwScalars<float>& scalars) {
  // clang-format off: it would indent the body below the attribute
  const auto step = [&](float* w, float* m, float* v, const typename Grad::Stored* g, typename Type::Stored* out)
      __attribute__((always_inline)) {
    Floats weight = Float32::load(w), mean = Float32::load(m), square = Float32::load(v);
    adamw_element(weight, mean, square, Grad::load(g), scalars, SquareRoot{});
    Float32::store(w, weight), Float32::store(m, mean), Float32::store(v, square);
    if (out) put(Type{}, out, weight, nullptr);
  };
  // clang-format on
  int64_t i = 0;
  for (; i + REDIT_LANES <= n; i += REDIT_LANES) step(w + i, m + i, v + i, g + i, out ? out + i : nullptr);
  if (i < n) {
    const size_t rest = size_t(n - i);
    float last_w[REDIT_LANES] = {}, last_m[REDIT_LANES] = {}, last_v[REDIT_LANES] = {};
    typename Grad::Stored last_g[REDIT_LANES] = {};
    typename Type::Stored last_out[REDIT_LANES];
    __builtin_memcpy(last_w, w + i, rest * sizeof *w);
    __builtin_memcpy(last_m, m + i, rest * sizeof *m);
    __builtin_memcpy(last_v, v + i, rest * sizeof *v);
    __builtin_memcpy(last_g, g + i, rest * sizeof *g);
    step(last_w, last_m, last_v, last_g, last_out);
    __builtin_memcpy(w + i, last_w, rest * sizeof *w);
    __builtin_memcpy(m + i, last_m, rest * sizeof *m);
    __builtin_memcpy(v + i, last_v, rest * sizeof *v);
    if (out) __builtin_memcpy(out + i, last_out, rest * sizeof *out);
  }
}

template <class W>
AdamwScalars<W> scalars_of(const AdamwStep& args, int64_t tensor) {
  const double step = double(*args.steps[tensor]) + 1;
  const AdamwOptions& options = args.options;
  return {options, std::pow(options.beta1, step), std::pow(options.beta2, step), *args.factor};
}

template <class Type>
void adamw(const AdamwStep& args, int64_t tensor, int64_t begin, int64_t end) {
  using Stored = typename Type::Stored;
  const Array &param = args.params[tensor], &master = args.masters[tensor], &grad = args.grads[tensor];
  auto* weights = static_cast<float*>((master.data ? master : param).data);
  if (!*args.finite) {
    if (master.data) store<float>(param, begin, end - begin, weights + begin);
    return;
  }
  const auto scalars = scalars_of<float>(args, tensor);
  alignas(64) float buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    float *w = weights + begin, *m = static_cast<float*>(args.exp_avgs[tensor].data) + begin;
    float* v = static_cast<float*>(args.exp_avg_sqs[tensor].data) + begin;
    Stored* out = master.data ? static_cast<Stored*>(param.data) + begin : nullptr;
    if (grad.dtype == dtype_of(Type{}))
      adamw_block<Type, Type>(w, m, v, static_cast<const Stored*>(grad.data) + begin, out, n, scalars);
    else
      adamw_block<Type, Float32>(w, m, v, load(buffer, grad, begin, n), out, n, scalars);
  }
}

void adamw_doubles(const AdamwStep& args, int64_t tensor, int64_t begin, int64_t end) {
  const Array &param = args.params[tensor], &master = args.masters[tensor];
  auto* w = static_cast<double*>((master.data ? master : param).data);
  auto* m = static_cast<double*>(args.exp_avgs[tensor].data);
  auto* v = static_cast<double*>(args.exp_avg_sqs[tensor].data);
  const auto scalars = scalars_of<double>(args, tensor);
  const bool finite = *args.finite;
  alignas(64) double buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const double* g = load(buffer, args.grads[tensor], begin, n) - begin;
    for (int64_t i = begin; finite && i < begin + n; ++i) adamw_element(w[i], m[i], v[i], g[i], scalars, SquareRoot{});
    if (master.data) store<double>(param, begin, n, w + begin);
  }
}
