// What Python hands over: plain structs of 8-byte fields, mirrored by upwell/ops/native.py.
#pragma once
#include <cstdint>

namespace upwell {

enum Format : int64_t { kF32 = 0, kBF16 = 1, kFP8 = 2, kFP4 = 3, kPanels = 4, kPairs = 5, kInt8 = 6, kInt4 = 7, kQuads = 8 };

constexpr int kPanel = 32;

// [rows, cols], row-major; FP8 and FP4 with UE8M0 scales as in upwell/formats. kPanels: FP32, each kPanel rows
// interleaved as [cols, kPanel], missing rows zero (upwell_pack). kPairs: BF16, the same but for two columns at a time,
// [ceil(cols / 2), kPanel, 2] (upwell_pack_pairs); their products round the inputs to BF16, too. kInt8, kInt4: `scale` holds
// FP32, one a row, and inputs are rounded to INT8 (integers.h). kQuads: kInt8 as [ceil(cols / 4), kPanel, 4]
// (upwell_pack_quads), with scales for whole panels.
struct Matrix {
  const void* data;
  const uint8_t* scale;
  int64_t rows, cols, format;
};

inline bool is_packed(const Matrix& m) { return m.format == kBF16 || m.format == kFP8 || m.format == kFP4; }

inline bool is_integer(const Matrix& m) { return m.format == kInt8 || m.format == kInt4 || m.format == kQuads; }

// x in BF16, to nearest even.
inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return uint16_t(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Mix {  // one sublayer's hyper-connection
  Matrix fn;  // [(2+h)h, hD]
  const float *base, *scale;
};

struct Compressor {
  Matrix wkv, wgate;  // [width, D]
  const float *ape, *norm;
  int64_t dim, width, ratio;
};

struct Layer {
  int64_t ratio;
  Mix mix_attn, mix_ffn;
  const float *attn_norm, *ffn_norm, *q_norm, *kv_norm, *sink;
  Matrix wq_a, wq_b, wkv, wo_a, wo_b;
  Compressor compressor, index_compressor;
  Matrix index_wq_b, index_weights;
  int64_t has_index;
  Matrix gate;
  const float* gate_bias;
  const int64_t* tid2eid;
  const Matrix* experts;  // w1, w3, w2 of each routed expert, then of the shared one
};

struct Model {
  int64_t hidden, streams, heads, dim, rope, window, q_rank, o_rank, groups;
  int64_t index_heads, index_dim, index_topk, experts, experts_per_token, inter, shared_inter;
  int64_t sinkhorn_iters, vocab, csa_ratio;
  int64_t rounds;     // 1: products round inputs to BF16 (packed.h: Inputs::rounds)
  int64_t by_tokens;  // 1: weights are panels, a layer's dense ones fit the CPU's cache (blocks.h)
  int64_t bytes;      // 1: caches hold windows, entries and index keys in INT8 (attention_bytes.h)
  double hc_eps, norm_eps, swiglu_limit, routed_scaling;
  const float *freqs, *compress_freqs;
};

struct LayerCache {  // window, entries and index_keys: FP32, or rows of bytes (Model::bytes)
  float *window, *entries, *tail_kv, *tail_gate, *index_keys, *index_tail_kv, *index_tail_gate;
  int64_t tail_ring, index_tail_ring;
};

struct Sequence {  // `length` new tokens of one sequence; its rows in the flat token axis start at `row`
  int64_t slot, start, length, row;
  const int64_t* table;
};

// What a call does of each layer. Ranks that share a model stop between them to exchange what they have.
enum Parts : int64_t {
  kEnterAttention = 1,  // streams -> x, post, comb
  kAttention = 2,       // x -> y, by the heads that are here
  kLeaveAttention = 4,  // y, post, comb -> streams
  kEnterExperts = 8,
  kExperts = 16,  // x -> y, by the routed and shared experts' parts that are here
  kLeaveExperts = 32,
  kAllParts = 63,
};
// Experts that aren't all in memory: called by thread 0 before the experts active[from, count) of a layer are used, and
// after those before `from` were. Puts some that are in memory first, points their matrices there, and returns where
// they end (> from); negative: they can't be had.
using Take = int64_t (*)(int64_t layer, int64_t from, int32_t* active, int64_t count);
// Told by thread 0, before a layer's attention, which experts its router would choose already: most of them it will.
using Expect = void (*)(int64_t layer, const int32_t* experts, int64_t count);

struct Call {
  const Model* model;
  const Layer* layers;
  const LayerCache* caches;
  int64_t layer_count;
  const Sequence* sequences;
  int64_t sequence_count, tokens, block_tokens;
  const int64_t* ids;
  const float* embed;  // [vocab, D]: streams begin as the tokens' rows of it. Null: they are given
  int64_t embed_stride;
  float* streams;  // [tokens, h, D], in place
  float* workspace;
  int64_t workspace_floats;
  int32_t* picks;  // null, or [layers, tokens, topk] for the indexer's selections (tests)
  Take take;       // null: every expert is in memory
  Expect expect;   // null: no guess is made
  int64_t* load;   // null, or [layers, experts]: pairs of token and expert, counted on
  int64_t parts;   // 0: all. Otherwise of these tokens, with the buffers below in place of the workspace's
  float *x, *y;        // [tokens, D]
  float *post, *comb;  // [tokens, h], [tokens, h, h]
  int64_t only_last;   // 1: of each sequence the streams after its last token alone, first in `streams`. Not with `parts`
};

struct ExpertsCall {  // a layer's routed experts alone: y [tokens, hidden] = each token's experts, weighted and summed
  const Model* model;
  const Matrix* experts;
  int64_t layer, tokens;
  const float* x;
  const int32_t* route;  // [tokens, k], and their weights
  const float* route_weights;
  float *y, *workspace;
  Take take;
};

struct Ring {  // rings by position, of one shape and behind each other: [layers, slots, places] rows of so many bytes
  char* rows;
  int64_t layers, slots, places, bytes;
};

struct ProductCall {  // out [tokens, m.rows] = x [tokens, m.cols] m^T
  Matrix m;
  const float* x;
  int64_t tokens;
  float *out, *workspace;
  int64_t rounds;
};

struct HeadCall {  // hyper head, norm, output head: streams [tokens, h, D] -> logits [tokens, V]
  const Model* model;
  Matrix fn;
  const float *base, *scale, *norm;
  Matrix head;
  int64_t tokens;
  const float* streams;
  float *logits, *workspace;
};

}  // namespace upwell
