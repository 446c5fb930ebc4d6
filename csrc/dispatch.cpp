// Picks the instruction set at run time, and the C entry points.
#include "kernels.h"
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_BF16  // older kernels' headers
#define HWCAP2_BF16 (1 << 14)
#endif
#endif

namespace upwell {
namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
};

bool runs(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512bf16") == 0)
    return runs("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (std::strcmp(name, "avx512vnni") == 0) return runs("avx512") && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
  if (std::strcmp(name, "bf16") == 0) return runs("dotprod") && getauxval(AT_HWCAP2) & HWCAP2_BF16;
  if (std::strcmp(name, "dotprod") == 0) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return std::strcmp(name, "baseline") == 0;
}

const Choice choices[] = {
#if defined(__x86_64__)
    {"avx512bf16", &avx512bf16::kernels},
    {"avx512vnni", &avx512vnni::kernels},
    {"avx512", &avx512::kernels},
    {"avx2", &avx2::kernels},
#elif defined(__aarch64__)
    {"bf16", &bf16::kernels},
    {"dotprod", &dotprod::kernels},
#endif
    {"baseline", &baseline::kernels},
};

const Choice* best() {
  for (const Choice& c : choices)
    if (runs(c.name)) return &c;
  return nullptr;
}

const Choice* current = best();

// weight [rows, cols] in panels, `together` columns at a time: out [ceil(rows / kPanel), ceil(cols / together), kPanel,
// together]; what is missing is zero. By blocks of columns, so that reads and writes stay in L1.
template <int together, class W, class T, class F>
void pack(const W* weight, int64_t rows, int64_t cols, T* out, F convert) {
  constexpr int64_t kColumns = 64;
  const int64_t padded = (cols + together - 1) / together * together;
  for (int64_t first = 0; first < rows; first += kPanel, out += kPanel * padded)
    for (int64_t k0 = 0; k0 < padded; k0 += kColumns) {
      const int64_t k1 = k0 + kColumns < padded ? k0 + kColumns : padded;
      for (int64_t r = 0; r < kPanel; ++r)
        for (int64_t k = k0; k < k1; ++k)
          out[(k / together * kPanel + r) * together + k % together] =
              first + r < rows && k < cols ? convert(weight[(first + r) * cols + k]) : T(0);
    }
}

}  // namespace
}  // namespace upwell

extern "C" {

// Name of the instruction set in use.
const char* upwell_isa() { return upwell::current->name; }

// Whether it multiplies FP4 by integer products of bytes.
int upwell_byte_dots() { return upwell::current->kernels->byte_dots; }

// Whether it has dot products of BF16 (simd.h).
int upwell_bf16_dots() { return upwell::current->kernels->bf16_dots; }

// Whether it has dot products of bytes for integer weights (integers.h).
int upwell_integer_dots() { return upwell::current->kernels->integer_dots; }

// Forces one: 0, or -1 where this machine or build lacks it.
int upwell_set_isa(const char* name) {
  for (const auto& c : upwell::choices)
    if (std::strcmp(c.name, name) == 0 && upwell::runs(name)) {
      upwell::current = &c;
      return 0;
    }
  return -1;
}

// weight [rows, cols] as panels: out [ceil(rows / kPanel) * kPanel * cols].
void upwell_pack(const float* weight, int64_t rows, int64_t cols, float* out) {
  upwell::pack<1>(weight, rows, cols, out, [](float x) { return x; });
}

// The same in BF16, rounded to nearest even, two columns at a time: out [ceil(rows / kPanel), ceil(cols / 2), kPanel, 2].
void upwell_pack_pairs(const float* weight, int64_t rows, int64_t cols, uint16_t* out) {
  upwell::pack<2>(weight, rows, cols, out, upwell::round_to_bf16);
}

// INT8 weights, four columns at a time: out [ceil(rows / kPanel), ceil(cols / 4), kPanel, 4].
void upwell_pack_quads(const int8_t* weight, int64_t rows, int64_t cols, int8_t* out) {
  upwell::pack<4>(weight, rows, cols, out, [](int8_t x) { return x; });
}

// Bytes of the structs as they were built: Python's mirror of them (ops/native.py) must agree.
int64_t upwell_struct_bytes() {
  return sizeof(upwell::Call) + sizeof(upwell::Layer) + sizeof(upwell::Model) + sizeof(upwell::Ring);
}

int64_t upwell_workspace_bytes(const upwell::Call* call, int threads) {
  return upwell::current->kernels->workspace_bytes(*call->model, call->layers, call->layer_count, call->sequences,
                                                   call->sequence_count, call->tokens, threads);
}

// -1, or, with nothing done, the first of the call's tokens whose id has no row in `embed`.
int64_t upwell_forward(upwell::Call* call) {
  for (int64_t t = 0; call->embed != nullptr && t < call->tokens; ++t)
    if (call->ids[t] < 0 || call->ids[t] >= call->model->vocab) return t;
  upwell::run_team(upwell::current->kernels->forward, call);
  return -1;
}

int64_t upwell_head_workspace_bytes(const upwell::HeadCall* call, int threads) {
  return upwell::current->kernels->head_workspace_bytes(*call->model, call->tokens, threads);
}

void upwell_head(upwell::HeadCall* call) { upwell::run_team(upwell::current->kernels->head, call); }

int64_t upwell_product_workspace_bytes(int64_t cols, int threads) {
  return upwell::current->kernels->product_workspace_bytes(cols, threads);
}

int64_t upwell_experts_workspace_bytes(const upwell::Model* model, int64_t tokens, int threads) {
  return upwell::current->kernels->experts_workspace_bytes(*model, tokens, threads);
}

void upwell_experts(upwell::ExpertsCall* call) { upwell::run_team(upwell::current->kernels->experts, call); }

void upwell_product(upwell::ProductCall* call) { upwell::run_team(upwell::current->kernels->product, call); }
}
