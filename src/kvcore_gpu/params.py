"""What a launch passes to a kernel: the structs of kernels/params.cuh, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class Rows(ctypes.Structure):
    """Rows of a call: q, k, v or out."""

    _fields_ = [
        ("data", c_void_p),
        ("sequence_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("dtype", c_int32),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("padded_length", c_int32),
    ]


class Blocks(ctypes.Structure):
    """K or V of one layer."""

    _fields_ = [
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("metadata_offset", c_int64),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("raw", c_void_p),
        ("raw_block_stride", c_int64),
        ("raw_head_stride", c_int64),
        ("raw_token_stride", c_int64),
        ("num_blocks", c_int32),
        ("num_heads", c_int32),
        ("block_size_log2", c_int32),
        ("raw_first", c_int32),
        ("raw_last", c_int32),
        ("saturate", c_int32),
    ]


class Plan(ctypes.Structure):
    """What a step means for one group."""

    _fields_ = [
        ("query_starts", c_void_p),
        ("seq_lens", c_void_p),
        ("slots", c_void_p),
        ("tables", c_void_p),
        ("raw_slots", c_void_p),
        ("raw_tables", c_void_p),
        ("copies", c_void_p),
        ("restores", c_void_p),
        ("num_sequences", c_int32),
        ("num_tokens", c_int32),
        ("table_width", c_int32),
        ("raw_width", c_int32),
        ("num_copies", c_int32),
        ("num_restores", c_int32),
        ("max_new", c_int32),
    ]


class Params(ctypes.Structure):
    """The one argument of a kernel. It is kept and launched from again and again.

    Attributes:
        arguments: address of the array of one pointer, to the struct, that the driver takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._argument = c_void_p(ctypes.addressof(self))
        self.arguments = ctypes.addressof(self._argument)


class CopyParams(Params):
    _fields_ = [("blocks", Blocks), ("plan", Plan)]


class AppendParams(Params):
    _fields_ = [
        ("k", Rows),
        ("v", Rows),
        ("k_blocks", Blocks),
        ("v_blocks", Blocks),
        ("plan", Plan),
        ("not_finite", c_void_p),
    ]


class ReadParams(Params):
    _fields_ = [
        ("blocks", Blocks),
        ("row", c_void_p),
        ("raw_row", c_void_p),
        ("start", c_int32),
        ("stop", c_int32),
        ("length", c_int32),
        ("out", Rows),
    ]


class RestoreParams(Params):
    _fields_ = [("blocks", Blocks), ("plan", Plan)]


class QuantizeParams(Params):
    _fields_ = [
        ("rows", c_void_p),
        ("codes", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("not_finite", c_void_p),
        ("num_rows", c_int64),
        ("dtype", c_int32),
    ]


class MergeParams(Params):
    _fields_ = [
        ("outs", c_void_p),
        ("lses", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("num_rows", c_int64),
        ("num_partials", c_int32),
        ("head_dim", c_int32),
    ]


class AttendParams(Params):
    _fields_ = [
        ("q", Rows),
        ("out", Rows),
        ("lse", c_void_p),
        ("k", Blocks),
        ("v", Blocks),
        ("plan", Plan),
        ("scale", c_float),
        ("softcap", c_float),
        ("alibi_slopes", c_void_p),
        ("sinks", c_void_p),
        ("positions", c_void_p),
        ("mask", c_void_p),
        ("mask_offsets", c_void_p),
        ("causal", c_int32),
        ("window", c_int32),
        ("group", c_int32),
        ("few_rows", c_int32),
        ("first_tile", c_int32),
        ("num_tiles", c_int32),
        ("first_sequence", c_int32),
        ("num_splits", c_int32),
        ("partial_out", c_void_p),
        ("partial_states", c_void_p),
        ("counters", c_void_p),
        ("tile_rows", c_int32),
    ]
