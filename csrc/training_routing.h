// Training's router, FP32: scores sqrt(softplus), the best experts by score and bias or the ones that a table gives, and
// their normalised scores as weights. After training_rows.h in each instruction set's namespace.

static void train_routing_forward(const RoutingTraining& a, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    float* s = a.scores + t * a.experts;
    map(s, a.logits + t * a.experts, a.experts,
        [&](Vec v, int64_t) { return square_root(select(v > 20.0f, v, softplus(v))); });
    int64_t* chosen = a.chosen + t * a.k;
    float total = 0.0f;
    if (a.given == nullptr) best_experts(s, a.bias, a.experts, a.k, chosen);
    else std::memcpy(chosen, a.given + t * a.k, sizeof(int64_t) * a.k);
    for (int64_t i = 0; i < a.k; ++i) total += s[chosen[i]];
    for (int64_t i = 0; i < a.k; ++i) a.weights[t * a.k + i] = s[chosen[i]] / total * a.scaling;
  }
}

static void train_routing_backward(const RoutingTraining& a, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float *s = a.scores + t * a.experts, *grad = a.grad + t * a.k;
    const int64_t* chosen = a.chosen + t * a.k;
    float total = 0.0f, mean = 0.0f, *out = a.grad_logits + t * a.experts;
    std::memset(out, 0, sizeof(float) * a.experts);
    for (int64_t i = 0; i < a.k; ++i) total += s[chosen[i]], mean += grad[i] * s[chosen[i]];
    mean /= total;
    for (int64_t i = 0; i < a.k; ++i) {
      const float score = s[chosen[i]], slope = -std::expm1(-score * score) / (2.0f * score);  // sigmoid / 2 score
      out[chosen[i]] += (grad[i] - mean) / total * a.scaling * slope;
    }
  }
}
