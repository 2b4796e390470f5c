"""A backend that attends with the GPU's kernels on the emulator, over blocks that the CPU wrote."""

from __future__ import annotations

from unittest import mock

import numpy as np

import kvcore
from cuda_emulator.runtime import EmulatedRuntime
from kvcore import arrays
from kvcore.attend_options import packed_mask, per_head, token_positions
from kvcore.cpu_backend import CpuBackend
from kvcore.cpu_storage import CpuStorage
from kvcore.formats import get_format
from kvcore_gpu import params
from kvcore_gpu.attention import Attention, Shape


class Storage(CpuStorage):
    """The CPU's blocks, with the raw rows of each within reach."""

    def _allocate(self, layer, name, head_dim, bias, scales):
        self.raw = None
        blocks = super()._allocate(layer, name, head_dim, bias, scales)
        self.parts = getattr(self, "parts", {})
        self.parts[id(blocks)] = (self.raw, bias, scales)
        return blocks

    def _allocate_raw(self, layer, head_dim):
        self.raw = super()._allocate_raw(layer, head_dim)
        return self.raw


class AttendingBackend(CpuBackend):
    """The CPU backend, but for attend."""

    def __init__(self, runtime: EmulatedRuntime) -> None:
        self.runtime = runtime
        self.scratch = {}
        self.kernels = {}
        self.kept = []

    def allocate(self, spec, num_blocks, device):
        self.spec = spec
        return Storage(spec, num_blocks)

    def get_scratch(self, name, count, dtype):
        array = self.scratch.get(name)
        if array is None or array.size < count:
            array = self.scratch[name] = self.runtime.zeros((count,), dtype)
        return self.runtime.address(array)

    def address(self, array, dtype=None):
        if array is None:
            return None
        if dtype is not None:
            array = np.ascontiguousarray(array, dtype)
        self.kept.append(self.runtime.as_array(array, "array"))
        return self.runtime.address(self.kept[-1])

    def rows(self, array, layout):
        strides = [stride // array.itemsize for stride in array.strides]
        at, padded = layout.index, len(layout) == 4 and layout[0] == "B"
        token = "S" if padded else "N"
        return params.Rows(
            data=self.address(array),
            sequence_stride=strides[0] if padded else 0,
            token_stride=strides[at(token)],
            head_stride=strides[at("H")],
            dtype=["float32", "float16", "bfloat16"].index(array.dtype.name),
            num_heads=array.shape[at("H")],
            head_dim=array.shape[-1],
            padded_length=array.shape[at(token)] if padded else 0,
        )

    def blocks_of(self, blocks, format, parts, spec):
        raw, bias, scales = parts
        array = blocks.array
        size, head_dim = blocks.block_size, blocks.head_dim
        made = params.Blocks(
            data=self.address(array),
            block_stride=array.strides[0],
            head_stride=array.strides[1],
            token_stride=0 if format.is_quantized else array.strides[2],
            metadata_offset=size * format.code_nbytes(head_dim) if format.is_quantized else 0,
            bias=self.address(bias, np.float32),
            scales=self.address(scales, np.float32),
            num_blocks=array.shape[0],
            num_heads=array.shape[1],
            block_size_log2=size.bit_length() - 1,
            raw_first=spec.raw_first,
            raw_last=spec.raw_last,
        )
        if raw is not None:
            made.raw = self.address(raw.array)
            made.raw_block_stride, made.raw_head_stride, made.raw_token_stride = raw.array.strides[
                :3
            ]
        return made

    def plan(self, plan):
        made = params.Plan(
            query_starts=self.address(plan.query_starts),
            seq_lens=self.address(plan.seq_lens),
            num_sequences=plan.num_sequences,
            num_tokens=plan.num_tokens,
            max_new=plan.max_new,
        )
        tables = plan.block_tables
        made.tables, made.table_width = self.address(tables), tables.shape[1]
        if plan.raw is not None:
            tables = plan.raw.block_tables
            made.raw_tables, made.raw_width = self.address(tables), tables.shape[1]
        return made

    def attend(self, storage, layer, plan, q, layout, options, return_lse, out):
        runtime, spec = self.runtime, self.spec
        self.kept = []
        q = np.ascontiguousarray(arrays.as_array(q, "q"))
        k_blocks, v_blocks = storage.layers[layer]
        facts = spec.layers[layer]
        k_format, v_format = (get_format(name) for name in (facts.k_format, facts.v_format))
        heads = q.shape[layout.index("H")]
        out = np.zeros((*q.shape[:-1], v_blocks.head_dim), q.dtype)
        lse = runtime.empty((plan.num_tokens, heads), np.float32)
        mask, mask_offsets = packed_mask(options.mask, plan)
        call = params.AttendParams()
        fields = dict(
            q=self.rows(q, layout),
            out=self.rows(out, layout),
            lse=self.address(lse),
            k=self.blocks_of(k_blocks, k_format, storage.parts[id(k_blocks)], spec),
            v=self.blocks_of(
                v_blocks, v_format, storage.parts.get(id(v_blocks), (None, None, None)), spec
            ),
            plan=self.plan(plan),
            scale=options.scale_for(facts.head_dim),
            softcap=options.softcap or 0.0,
            alibi_slopes=self.address(per_head(options.alibi_slopes, "alibi_slopes", heads)),
            sinks=self.address(per_head(options.sinks, "sinks", heads)),
            positions=self.address(token_positions(options.positions, plan.num_tokens)),
            mask=self.address(mask),
            mask_offsets=self.address(mask_offsets),
            causal=bool(options.causal),
            window=options.window or 0,
            group=heads // k_blocks.num_heads,
        )
        for name, value in fields.items():
            setattr(call, name, value)
        given = (options.softcap, options.alibi_slopes, options.positions, mask, options.window)
        shape = Shape(
            k_format, v_format, facts.head_dim, v_blocks.head_dim, bool(facts.v_in_k),
            k_blocks.num_heads, call.group, k_blocks.block_size, call.q.dtype,
            any(option is not None for option in given) or not options.causal, options.exact,
        )  # fmt: skip
        if shape not in self.kernels:
            self.kernels[shape] = Attention(runtime, shape)
        for _ in range(2):
            for launch in self.kernels[shape].launches(call, self.get_scratch):
                *kernel, call.first_tile = launch
                runtime.launch(*kernel, call)
            results = getattr(self, "results", None)
            self.results = out.copy(), np.array(lse)
            if _ == 1:
                for a, b in zip(results, self.results, strict=True):
                    assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), "twice"
        return (out, np.array(lse)) if return_lse else out


def attending(runtime: EmulatedRuntime, spec: kvcore.CacheSpec, *sizes, **options):
    """A cache whose attention runs on the emulator."""
    backend = AttendingBackend(runtime)
    with mock.patch("kvcore.cache.get_backend", lambda name: backend):
        return kvcore.KVCache(spec, *sizes, **options)
