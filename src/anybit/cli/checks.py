"""The checks of `anybit doctor`: each returns one line of detail, or raises with the reason."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, version

from anybit.errors import AnybitError

ROOM = 2_000_000_000
"""Bytes a demo writes: the converted model, one checkpoint, the hidden states in between."""

# Written out by hand from the definition in formats/planes.py, so that reference and kernel cannot be wrong together.
GOLDEN_BITS, GOLDEN_CODES = 3, [[5, 2, 7, 0, 1, 6, 3, 4, 5], [0, 0, 0, 0, 0, 0, 0, 0, 2]]
GOLDEN_PLANES = [[[0b10100101, 1], [0, 0]], [[0b01100110, 0], [0, 1]], [[0b01010101, 1], [0, 0]]]


class CheckError(AnybitError):
    """A check found something wrong."""


def python_version() -> str:
    """Python is new enough."""
    from packaging.specifiers import SpecifierSet

    running, wanted = platform.python_version(), SpecifierSet(_metadata()["Requires-Python"])
    if not wanted.contains(running, prereleases=True):
        raise CheckError(f"Python {running} is outside the tested range {wanted}")
    return running


def dependency_versions() -> str:
    """Every dependency is installed, in the range anybit declares."""
    from packaging.requirements import Requirement

    declared = _metadata().get_all("Requires-Dist") or []
    wanted = [w for w in map(Requirement, declared) if not w.marker or w.marker.evaluate()]
    for want in wanted:
        if not want.specifier.contains(version(want.name), prereleases=True):
            raise CheckError(f"{want.name} {version(want.name)} is outside the tested range {want.specifier}")
    return ", ".join(f"{w.name} {version(w.name)}" for w in wanted if w.name in ("torch", "transformers"))


def _metadata() -> PackageMetadata:
    try:
        return metadata("anybit")
    except PackageNotFoundError:
        raise CheckError("anybit itself is not installed, only found on the path") from None


def native_module() -> str:
    """The compiled kernels are there."""
    from anybit.kernels import native

    module = native.loaded()
    return f"{native.isa()}, {module.threads()} threads"


def golden_planes() -> str:
    """Reference and native pack and unpack the hand-written example exactly."""
    import torch

    from anybit.kernels.planes.op import IMPLEMENTATIONS, pack, unpack

    codes = torch.tensor(GOLDEN_CODES, dtype=torch.uint8)
    planes = torch.tensor(GOLDEN_PLANES, dtype=torch.uint8)
    for impl in IMPLEMENTATIONS:
        if not torch.equal(pack(codes, GOLDEN_BITS, impl), planes):
            raise CheckError(f"'{impl}' packs the golden codes wrongly")
        if not torch.equal(unpack(planes, codes.shape[1], impl), codes):
            raise CheckError(f"'{impl}' unpacks the golden planes wrongly")
    return f"{len(IMPLEMENTATIONS)} implementations, exact"


def native_planes() -> str:
    """Native and reference planes are equal for every width, at column counts around byte and vector edges."""
    import torch

    from anybit.kernels.planes.op import pack, unpack

    draw = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        for columns in (1, 7, 8, 9, 63, 64, 65, 515):
            codes = torch.randint(2**bits, (5, columns), dtype=torch.uint8, generator=draw)
            planes = pack(codes, bits, "native")
            same = torch.equal(planes, pack(codes, bits, "reference"))
            if not same or not torch.equal(unpack(planes, columns, "native"), codes):
                raise CheckError(f"native planes are wrong at {bits} bits, {columns} columns")
    return "1 to 8 bits, exact"


def linear_kernels() -> str:
    """Native linear kernels agree with a float64 product of the decoded weights, for every width."""
    worst = max(_linear_error(bits, tokens) for bits in range(1, 9) for tokens in (1, 5, 33))
    # A float32 sum of K = 200 terms errs by at most K * 2^-24 = 1.2e-5 of the sum of magnitudes.
    if not worst <= 2e-5:
        raise CheckError(f"native linear is off by {worst:.2e} of the sum of magnitudes")
    return f"1 to 8 bits, largest error {worst:.1e}"


def _linear_error(bits: int, tokens: int) -> float:
    """Largest |y - exact| / sum |x w| of all native implementations on random weights [37, 200]."""
    import torch

    from anybit.formats.planes import pack
    from anybit.kernels.linear_w_a16 import reference
    from anybit.kernels.linear_w_a16.op import multiply
    from anybit.kernels.linear_w_a16.weight import Weight

    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (37, 200), dtype=torch.uint8, generator=draw)
    zero = torch.randint(2**bits, (37, 7), dtype=torch.uint8, generator=draw)
    scale = (torch.rand(37, 7, generator=draw) + 0.1).half()
    x = torch.randn(tokens, 200, generator=draw)
    weight = Weight(pack(codes, bits), scale, zero, 32, 200)
    dense = reference.decode(weight).double()
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    results = (multiply(x, weight, impl) for impl in ("native-lookup", "native-decode"))
    return max(float(((y - exact).abs() / size.clamp_min(1e-30)).max()) for y in results)


def demo_model() -> str:
    """The demo model's file is installed."""
    from anybit.models.demo import demo_gguf

    return demo_gguf().name


def wiki_text() -> str:
    """The calibration and test articles can be read."""
    from anybit.calibration.text import read_documents

    return f"{len(read_documents('wiki'))} articles to calibrate on"


def disk_space() -> str:
    """There is room for a demo, in the cache and where we are."""
    from anybit.cache import cache_root

    for place in (cache_root(), "."):
        free = shutil.disk_usage(place).free
        if free < ROOM:
            raise CheckError(f"{free / 1e9:.1f} GB free in {place}")
    return f"{shutil.disk_usage('.').free / 1e9:.0f} GB free"
