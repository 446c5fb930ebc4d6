// Training's compressor pooling, FP32: a softmax per channel over the tokens of a window and, where windows overlap, of
// the window before. After training_attention.h in each instruction set's namespace.

struct PoolWindow {
  const PoolTraining& a;
  const bool overlaps;
  int64_t number, first;  // within its sequence; its first token among all

  PoolWindow(const PoolTraining& call, int64_t row)
      : a(call), overlaps(call.width != call.dim), number(row % call.windows),
        first(row / call.windows * call.steps + number * call.ratio) {}
  // f(at, bias) for each slot's first channel: where it is in kv and gate, and in ape.
  template <class F>
  void each(F f) const {
    const int64_t own = a.width - a.dim;
    if (overlaps && number > 0)
      for (int64_t i = 0; i < a.ratio; ++i) f((first - a.ratio + i) * a.width, i * a.width);
    for (int64_t i = 0; i < a.ratio; ++i) f((first + i) * a.width + own, i * a.width + own);
  }
  // Channels [k, k + part): the greatest gate, the sum of the weights below it, and the mean.
  void reduce(int64_t k, int part, Vec* top, Vec* total, Vec* mean) const {
    *top = splat(-__builtin_inff()), *total = *mean = zero();
    each([&](int64_t at, int64_t bias) { *top = larger(gate(at + k, bias + k, part), *top); });
    each([&](int64_t at, int64_t bias) {
      const Vec weight = exp_below(gate(at + k, bias + k, part) - *top);
      *total += weight;
      *mean += weight * load_some(a.kv + at + k, part);
    });
    *mean /= *total;
  }
  Vec gate(int64_t at, int64_t bias, int part) const {
    return load_some(a.gate + at, part) + load_some(a.ape + bias, part);
  }
};

static void train_pool_forward(const PoolTraining& a, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    const PoolWindow window(a, row);
    each_vector(a.dim, [&](int64_t k, int part) {
      Vec top, total, mean;
      window.reduce(k, part, &top, &total, &mean);
      store_some(a.out + row * a.dim + k, mean, part);
    });
  }
}

// grad_ape [ratio, width] is added to; gradients of tokens in no window are zero.
static void train_pool_backward(const PoolTraining& a, float* grad_ape, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    const PoolWindow window(a, row);
    each_vector(a.dim, [&](int64_t k, int part) {
      Vec top, total, mean;
      window.reduce(k, part, &top, &total, &mean);
      const Vec grad = load_some(a.grad + row * a.dim + k, part) / total;
      window.each([&](int64_t at, int64_t bias) {
        const Vec of_kv = exp_below(window.gate(at + k, bias + k, part) - top) * grad;
        const Vec of_gate = of_kv * (load_some(a.kv + at + k, part) - mean);
        store_some(a.grad_kv + at + k, of_kv, part);
        store_some(a.grad_gate + at + k, of_gate, part);
        store_some(grad_ape + bias + k, load_some(grad_ape + bias + k, part) + of_gate, part);
      });
    });
    if (window.number + 1 < a.windows) continue;
    const int64_t end = (row / a.windows + 1) * a.steps, after = window.first + a.ratio;
    auto clear = [&](float* grads) {
      for (int64_t t = window.first; window.overlaps && t < after; ++t)
        std::memset(grads + t * a.width, 0, sizeof(float) * a.dim);
      std::memset(grads + after * a.width, 0, sizeof(float) * (end - after) * a.width);
    };
    clear(a.grad_kv), clear(a.grad_gate);
  }
}
