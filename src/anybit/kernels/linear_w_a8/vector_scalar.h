// Portable vectors of 16 rows, also the definition of what the others do.
//
//   Codes                      64 bytes: 4 columns of 16 rows, byte 4 r + c
//   expand<P>(lines, out)      8 Codes out of one line of each plane; P is 2, 4 or 8 lines, most significant first
//   spread<Q>(kept, mask, z)   Codes of quad Q of a 2:4-sparse chunk out of the kept ones of quads Q and Q ^ 1, two each, and 16
//                              words, the masks of 32 columns; the others are 0, and all have the bit z changed
//   Ints, Reals                16 lanes, one a row
//   dot<P>(sum, codes, x)      sum[r] += sum_c codes[4 r + c] * x[c], exact
//   subtract(c, a, b)          c - a * b, one rounding; of integers with one b for all lanes: exact
//   to_ints(a)                 whole numbers as integers
#pragma once

#include <cstring>

namespace anybit::ANYBIT_TARGET {

struct Codes {
  std::uint8_t v[64];
};
struct Ints {
  std::int32_t v[16];
};
struct Reals {
  float v[16];
};

constexpr bool kPairs = false;  // whether registers hold the sums of two row blocks for six tokens

template <size_t P>
ANYBIT_INLINE void expand(const std::uint8_t* const* lines, Codes (&out)[8]) {
  for (size_t q = 0; q < 8; ++q)
    for (size_t r = 0; r < 16; ++r) {
      const size_t at = r / 4 * 16 + 2 * q + r / 2 % 2, shift = r % 2 * 4;
      std::uint32_t code[4] = {};
      for (size_t p = 0; p < P; ++p)
        for (size_t c = 0; c < 4; ++c) code[c] = code[c] * 2 + (lines[p][at] >> (shift + c) & 1u);
      for (size_t c = 0; c < 4; ++c) out[q].v[4 * r + c] = static_cast<std::uint8_t>(code[c]);
    }
}

ANYBIT_INLINE Codes load_codes(const std::uint8_t* p) {
  Codes c;
  std::memcpy(c.v, p, 64);
  return c;
}
ANYBIT_INLINE void store_codes(std::uint8_t* p, const Codes& c) { std::memcpy(p, c.v, 64); }

template <size_t Q>
ANYBIT_INLINE Codes spread(const Codes& kept, const Codes& mask, int z) {
  Codes out;
  for (size_t r = 0; r < 16; ++r) {
    const std::uint8_t* from = kept.v + 4 * r + Q % 2 * 2;
    const int bits = mask.v[4 * r + Q / 2] >> (Q % 2 * 4);
    for (size_t c = 0; c < 4; ++c) out.v[4 * r + c] = static_cast<std::uint8_t>((bits >> c & 1 ? *from++ : 0) ^ z);
  }
  return out;
}

ANYBIT_INLINE Ints zero_ints() { return {}; }
template <size_t P>
ANYBIT_INLINE void dot(Ints& sum, const Codes& codes, const std::int8_t* x) {
  for (size_t r = 0; r < 16; ++r)
    sum.v[r] += codes.v[4 * r] * x[0] + codes.v[4 * r + 1] * x[1] + codes.v[4 * r + 2] * x[2] + codes.v[4 * r + 3] * x[3];
}
ANYBIT_INLINE Ints add(Ints a, const Ints& b) {
  for (size_t r = 0; r < 16; ++r) a.v[r] += b.v[r];
  return a;
}

ANYBIT_INLINE Reals to_reals(const Ints& a) {
  Reals out;
  for (size_t r = 0; r < 16; ++r) out.v[r] = static_cast<float>(a.v[r]);
  return out;
}
ANYBIT_INLINE Ints to_ints(const Reals& a) {
  Ints out;
  for (size_t r = 0; r < 16; ++r) out.v[r] = static_cast<std::int32_t>(a.v[r]);
  return out;
}
ANYBIT_INLINE Ints mul(Ints a, const Ints& b) {
  for (size_t r = 0; r < 16; ++r) a.v[r] *= b.v[r];
  return a;
}
ANYBIT_INLINE Ints subtract(Ints c, const Ints& a, std::int32_t b) {
  for (size_t r = 0; r < 16; ++r) c.v[r] -= a.v[r] * b;
  return c;
}
ANYBIT_INLINE Reals splat(float a) {
  Reals out;
  for (float& v : out.v) v = a;
  return out;
}
ANYBIT_INLINE Reals load_reals(const float* p) {
  Reals out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
ANYBIT_INLINE Reals load_halves(const std::uint16_t* p) {
  Reals out;
  halves(p, out.v, 16);
  return out;
}
ANYBIT_INLINE Reals load_bytes(const std::uint8_t* p) {
  Reals out;
  for (size_t r = 0; r < 16; ++r) out.v[r] = static_cast<float>(p[r]);
  return out;
}
ANYBIT_INLINE Reals load_nibbles(const std::uint8_t* p) {
  Reals out;
  for (size_t r = 0; r < 8; ++r) out.v[r] = static_cast<float>(p[r] & 15), out.v[r + 8] = static_cast<float>(p[r] >> 4);
  return out;
}
ANYBIT_INLINE Reals mul(Reals a, const Reals& b) {
  for (size_t r = 0; r < 16; ++r) a.v[r] *= b.v[r];
  return a;
}
ANYBIT_INLINE Reals fma(const Reals& a, const Reals& b, Reals c) {
  for (size_t r = 0; r < 16; ++r) c.v[r] = __builtin_fmaf(a.v[r], b.v[r], c.v[r]);
  return c;
}
ANYBIT_INLINE Reals subtract(Reals c, const Reals& a, const Reals& b) {
  for (size_t r = 0; r < 16; ++r) c.v[r] = __builtin_fmaf(-a.v[r], b.v[r], c.v[r]);
  return c;
}
ANYBIT_INLINE void store(float* y, const Reals& a, size_t lanes) { std::memcpy(y, a.v, lanes * sizeof(float)); }
ANYBIT_INLINE void store(std::int32_t* y, const Ints& a, size_t lanes) { std::memcpy(y, a.v, lanes * sizeof(std::int32_t)); }

}  // namespace anybit::ANYBIT_TARGET
