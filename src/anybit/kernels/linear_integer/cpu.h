// A whole layer on integers, from rows to rows: quantize_activations, linear_w_a8 and linear_side in one call; op.py has the contract.
#pragma once

#include "halves.h"
#include "linear_side/cpu.h"

namespace anybit {

struct IntegerLayer {
  TiledWeight weight;
  SideWeight side;
  Scheme scheme;
};

// Some hundreds of tokens at a time, so that what lies between is still in the caches and takes no memory of its own. y[t, n] is what
// the three kernels give, bit for bit.
void linear_integer(const IntegerLayer& layer, const Rows& rows);

}  // namespace anybit
