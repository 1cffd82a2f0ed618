"""Function-preserving channel rescale: the primitive that smoothing and equalisation transforms are written with.

Where a block can be rescaled is a fact about the model, found and verified in `anybit.models.pairs`; it is offered here
because methods that *choose* scales (SmoothQuant, AWQ, ...) look for it among the transforms.
"""

from __future__ import annotations

from anybit.models.pairs import ScalePair, apply_scale, scale_pairs

__all__ = ["ScalePair", "apply_scale", "scale_pairs"]
