"""How K and V are stored: "rot8" for both, or "chan4/rot4" for each."""

from __future__ import annotations

import argparse
import math

from kvcore.errors import InvalidArgument
from kvcore.formats import Format, get_format

#: The formats of floats, alike for K and V; peers without quantized caches know these.
FLOATS = ("fp32", "fp16", "bf16")

#: What is measured at a kind of case when nothing else is asked for.
DEFAULT_FORMATS = {
    "decode": (*FLOATS, "rot8", "rot4", "chan4/rot4"),
    "prefill": (*FLOATS, "rot4"),
    "append": (*FLOATS, "rot8", "rot4", "chan4/rot4"),
}

#: Of quantized K and V, the first tokens and the last ones (up to 31 more) that are read in bf16.
RAW_FIRST, RAW_LAST = 4, 32

#: How wrong an answer may be, rms over rms. Some peers compute in the cache's dtype.
_MAX_FLOAT_ERROR = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}
#: What a row of independent normal numbers loses, rms over rms; docs/formats.md.
_ROW_ERROR = {
    "fp32": 0.0,
    "fp16": 2e-4,
    "bf16": 2e-3,
    "int8": 0.0065,
    "int8_static": 0.011,  # a scale for all tokens, of which one is largest
    "fp8_e4m3": 0.026,
    "rot8": 0.0065,
    "rot6": 0.026,
    "int4": 0.078,
    "chan4": 0.078,
    "rot4": 0.095,
    "rot3": 0.18,
    "rot2": 0.34,
    "chan2": 0.4,
}
#: Other libraries' formats of so many bits; a scale for all tokens of a channel loses most.
_MAX_PEER_ERROR = {8: 0.03, 4: 0.4}


def kv_format(text: str) -> str:
    """The usual spelling of what `text` names: one format, or K's and V's with a slash between.

    Raises:
        InvalidArgument: there is no such format, or none for V.
    """
    k, _, v = text.partition("/")
    pair = get_format(k), get_format(v or k)
    if pair[1].kind == "channel":
        raise InvalidArgument(
            f"V in {pair[1].name}: expected a format that encodes each token alone, as in "
            f"{pair[0].name}/rot4"
        )
    return pair[0].name if pair[0] == pair[1] else f"{pair[0].name}/{pair[1].name}"


def parse(text: str) -> list[str]:
    """Comma-separated formats of a command line."""
    try:
        return [kv_format(name) for name in text.split(",") if name]
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def k_and_v(kv_format: str) -> tuple[Format, Format]:
    """The formats of K and V."""
    k, _, v = kv_format.partition("/")
    return get_format(k), get_format(v or k)


def is_quantized(kv_format: str) -> bool:
    """Whether K or V is."""
    return any(side.is_quantized for side in k_and_v(kv_format))


def quantized_bits(kv_format: str) -> int | None:
    """Bits of an element where K and V are quantized alike: all that peers can be asked for."""
    k, v = k_and_v(kv_format)
    if k.is_quantized and v.is_quantized and k.element_bits == v.element_bits:
        return k.element_bits
    return None


def max_error(kv_format: str, *, peer: bool = False) -> float:
    """How far from the truth an answer may be, rms over rms, of kvcore or of a peer.

    Errors of K move the weights and those of V the rows that are weighted; the two are independent.
    """
    bits = quantized_bits(kv_format)
    if peer and bits in _MAX_PEER_ERROR:
        return _MAX_PEER_ERROR[bits]
    k, v = k_and_v(kv_format)
    if not is_quantized(kv_format):
        return max(_MAX_FLOAT_ERROR[k.name], _MAX_FLOAT_ERROR[v.name])
    return 1.5 * math.hypot(_ROW_ERROR[k.name], _ROW_ERROR[v.name])
