// One AdamW step in torch.optim.AdamW's order of operations, in float or double. Not its bits: torch's lerp fuses its
// multiply-add and its float32 sqrt misses the last bit of 5 % of values; here IEEE rounds every operation.
//
// T is a number or a vector of them, `root` takes its square root. No include guard: adamw_chunks.h includes it once
// per instruction set, which vectors in arguments need.
template <class T, class Number, class Root>
REDIT_HD void adamw_element(T& weight, T& m, T& v, T grad, const AdamwScalars<Number>& s, Root root) {
  const T g = grad * s.factor;
  m = s.from_grad ? g + s.other_lerp * (g - m) : m + s.lerp * (g - m);
  v = v * s.beta2 + (s.one_minus_beta2 * g) * g;
  weight = weight * s.decay + (m * s.minus_step_size) / (root(v) / s.root_correction2 + s.eps);
}
