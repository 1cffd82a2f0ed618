// AMX for the few tokens of a checked guess or of several sequences: planes become codes, products and floats in one stream.
//
// VPDPBUSD and the float epilogue share two ports; here the products leave them. What waits for each other is kept apart: codes
// are stored kLead groups before a tile reads them (a tile load cannot take them from stores still under way), a tile leaves two
// groups after its product (52 cycles), and its floats follow two groups later. The stream does not stop between row blocks:
// where groups are whole, planes and tables of all groups of all row blocks lie one behind the other.
#pragma once

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kFewest = 5, kLead = 3, kSlots = 8, kFewColumns = 128;  // kFewColumns: of the widest group

ANYBIT_INLINE bool suits_few(const TiledWeight& w, size_t tokens) {
  return !w.grain && tokens >= kFewest && tokens <= kTileTokens && w.groups > 1 && w.group_size <= kFewColumns &&
         w.groups * w.group_size == w.columns;
}

// Groups of row blocks, counted on from one row block to the next.
template <class Source, bool kCentred>
class Few {
 public:
  Few(const TiledWeight& w, const Activations& x, const Output& out, size_t first)
      : w_(w), x_(x), out_(out), source_(w, first), per_group_(w.group_size / TiledWeight::kColumns),
        table_(first * w.groups), y_(out.y + first * TiledWeight::kRows), first_(first * TiledWeight::kRows) {}

  ANYBIT_INLINE size_t chunks() const { return per_group_; }
  ANYBIT_INLINE std::uint8_t* codes(size_t item) { return codes_ + item % kSlots * per_group_ * 512; }
  ANYBIT_INLINE std::int32_t* sums(size_t tile) { return sums_[tile]; }

  // The codes of group `item` into its slot.
  ANYBIT_INLINE void expand(size_t item) {
    const __m512i zero = kCentred ? zeros(table_ + item) : _mm512_setzero_si512();
    std::uint8_t* to = codes(item);
    for (size_t chunk = item * per_group_, end = chunk + per_group_; chunk < end; ++chunk, to += 512) {
      Codes quads[kQuads];
      source_.load(chunk, quads);
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q) store_codes(to + 64 * q, kCentred ? _mm512_sub_epi8(quads[q], zero) : quads[q]);
    }
    __builtin_prefetch(reinterpret_cast<const std::uint8_t*>(w_.scale + (table_ + item) * TiledWeight::kRows) + kScaleAhead);
    if (w_.zero) __builtin_prefetch(w_.zero + (table_ + item) * w_.zero_bytes + kZeroAhead);
  }

  // The activations of the next group.
  ANYBIT_INLINE const std::int8_t* activations() {
    const std::int8_t* xs = x_.codes + now_ * w_.group_size;
    now_ = now_ + 1 == w_.groups ? 0 : now_ + 1;
    return xs;
  }

  // The sums that a tile left of group `item`, as floats.
  ANYBIT_INLINE void finish(size_t item, const std::int32_t* sum) {
    if (out_.sums) {
      keep(sum);
    } else {
      const Grid grid(w_, table_ + item);
      if (done_ == 0) add_floats<true, false>(sum, grid);
      else if (done_ + 1 < w_.groups) add_floats<false, false>(sum, grid);
      else add_floats<false, true>(sum, grid);
    }
    if (++done_ == w_.groups) done_ = 0, first_ += TiledWeight::kRows, y_ += TiledWeight::kRows;
  }

 private:
  // Zeros of a group as they lie among codes: those of a row four times.
  ANYBIT_INLINE __m512i zeros(size_t table) const { return group_zeros(w_, 0, table); }

  ANYBIT_INLINE size_t lanes() const { return least(TiledWeight::kRows, w_.rows - first_); }

  void keep(const std::int32_t* sum) const {
    for (size_t t = 0; t < x_.tokens; ++t)
      std::memcpy(out_.sums + (t * w_.groups + done_) * w_.rows + first_, sum + 16 * t, 4 * lanes());
  }

  template <bool kBegins, bool kEnds>
  ANYBIT_INLINE void add_floats(const std::int32_t* sum, const Grid& grid) {
    const size_t groups = w_.groups, tokens = x_.tokens;
    const float *scale = x_.scale + done_, *x_sum = x_.sums + done_;
    float *total = totals_[0], *y = y_;
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      Reals real = _mm512_cvtepi32_ps(_mm512_load_si512(sum));
      if constexpr (!kCentred) real = subtract(real, grid.zero, splat(*x_sum));
      real = fma(mul(grid.scale, splat(*scale)), real, kBegins ? splat(0.0f) : _mm512_load_ps(total));
      if constexpr (kEnds) store(y, real, lanes());
      else _mm512_store_ps(total, real);
      sum += 16, total += 16, scale += groups, x_sum += groups;
      if constexpr (kEnds) y += out_.y_stride;
    }
  }

  const TiledWeight& w_;
  const Activations& x_;
  const Output& out_;
  const Source source_;
  const size_t per_group_, table_;      // chunks of a group; where the tables begin
  size_t now_ = 0, done_ = 0;           // the next group's place in its row block, of products and of floats
  float* y_;
  size_t first_;                        // first row of the row block whose floats are under way
  alignas(4096) std::int32_t sums_[4][256];
  alignas(64) std::uint8_t codes_[kSlots * kFewColumns * 16];
  alignas(64) float totals_[kTileTokens][16];
};

// All tokens for row blocks [first, last).
template <class Source, bool kCentred>
void stream_few(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last) {
  const TileSession session(TiledWeight::kColumns, x.tokens);
  Few<Source, kCentred> few(w, x, out, first);
  const size_t items = (last - first) * w.groups, stride = x.stride;
  for (size_t item = 0; item < least(kLead, items); ++item) few.expand(item);
  // Codes of group at + kLead, floats of group at - 4, products of group at, tile of group at - 2.
#define ANYBIT_FEW(i, a, b, before)                                                 \
  {                                                                                 \
    const size_t at = item + i;                                                     \
    if (at + kLead < items) few.expand(at + kLead);                                 \
    if (at >= 4 && at - 4 < items) few.finish(at - 4, few.sums(i));                 \
    if (at < items) {                                                               \
      const std::int8_t* xs = few.activations();                                    \
      const std::uint8_t* codes = few.codes(at);                                    \
      _tile_zero(i);                                                                \
      for (size_t chunk = 0; chunk < few.chunks(); ++chunk) {                       \
        _tile_loadd(a, xs + chunk * TiledWeight::kColumns, stride);                 \
        _tile_loadd(b, codes + chunk * 512, 64);                                    \
        if constexpr (kCentred) _tile_dpbssd(i, a, b);                              \
        else _tile_dpbsud(i, a, b);                                                 \
      }                                                                             \
    }                                                                               \
    if (at >= 2 && at - 2 < items) _tile_stored(before, few.sums(before), 64);      \
  }
  for (size_t item = 0; item < items + 4; item += 4) {
    ANYBIT_FEW(0, 4, 6, 2)
    ANYBIT_FEW(1, 5, 7, 3)
    ANYBIT_FEW(2, 4, 6, 0)
    ANYBIT_FEW(3, 5, 7, 1)
  }
#undef ANYBIT_FEW
}

template <class Source>
bool multiply_few(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last) {
  if constexpr (Source::kSparse) return false;  // seldom has groups: not worth its code
  else {
    if (first == last || !suits_few(w, x.tokens)) return false;
    const auto stream = !out.sums && can_center(w) ? stream_few<Source, true> : stream_few<Source, false>;
    stream(w, x, out, first, last);
    return true;
  }
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
