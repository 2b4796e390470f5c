"""Other libraries at the same cases: contiguous or paged caches of their own, in 16 bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bench.gpu.targets import Target, dtype_of

#: A library's name: what prepares (target, layers) as one call that goes over all layers.
Prepare = Callable[[Target, int], Callable[[], None]]


def is_comparable(target: Target) -> bool:
    """Whether the peers have the case: attention in 16 bits over sequences of one length."""
    case = target.case
    return (
        case.kind in ("decode", "prefill")
        and target.kv_format in ("fp16", "bf16")
        and len(set(case.seq_lens)) == 1
        and (case.kind == "decode" or not any(case.stored))
    )


def missing(name: str) -> str | None:
    """Why a library cannot be imported; None where it can."""
    for module in (name.partition("-")[0], "torch"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return str(error)
    return None


def torch_sdpa(backend: str, fold: bool) -> Prepare:
    """scaled_dot_product_attention by one of its backends.

    Args:
        backend: a name of torch.nn.attention.SDPBackend.
        fold: for decode, take the query heads of a group as rows of one query.
    """

    def prepare(target: Target, num_layers: int) -> Callable[[], None]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        case = target.case
        group = case.num_heads // case.num_kv_heads
        folds = fold and case.kind == "decode"
        if fold and not folds:
            raise ValueError("only decode steps can take heads as rows")
        q, layers = _contiguous(target, num_layers)
        if folds:
            q = q.reshape(len(case.new), case.num_kv_heads, group, case.head_dim)
        options: dict[str, Any] = {"is_causal": case.kind == "prefill"}
        if group > 1 and not folds:
            options["enable_gqa"] = True

        def run() -> None:
            with torch.no_grad(), sdpa_kernel([getattr(SDPBackend, backend)]):
                for k, v in layers:
                    scaled_dot_product_attention(q, k, v, **options)

        return run

    return prepare


def torch_flex(target: Target, num_layers: int) -> Callable[[], None]:
    """flex_attention, compiled."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = target.case
    q, layers = _contiguous(target, num_layers)
    mask = None
    if case.kind == "prefill":
        length = case.new[0]
        mask = create_block_mask(
            lambda batch, head, i, j: i >= j, None, None, length, length, device="cuda"
        )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run() -> None:
        with torch.no_grad():
            for k, v in layers:
                compiled(q, k, v, block_mask=mask, enable_gqa=case.num_heads > case.num_kv_heads)

    return run


def flashinfer(target: Target, num_layers: int) -> Callable[[], None]:
    """FlashInfer: paged decode with pages of 16, or a single prefill."""
    import flashinfer as library
    import torch

    case = target.case
    dtype = getattr(torch, dtype_of(target))
    heads = case.num_heads, case.num_kv_heads, case.head_dim
    if case.kind == "prefill":
        q = _random(torch, (case.num_tokens, case.num_heads, case.head_dim), dtype)
        layers = [
            tuple(_random(torch, (case.num_tokens, *heads[1:]), dtype) for _ in range(2))
            for _ in range(num_layers)
        ]

        def prefill() -> None:
            for k, v in layers:
                library.single_prefill_with_kv_cache(q, k, v, causal=True)

        return prefill
    page, count = 16, len(case.new)
    per_sequence = -(-case.seq_lens[0] // page)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    indices = torch.randperm(count * per_sequence, device="cuda").to(torch.int32)
    starts = torch.arange(count + 1, device="cuda", dtype=torch.int32) * per_sequence
    last = torch.full((count,), (case.seq_lens[0] - 1) % page + 1, dtype=torch.int32, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.clone(), paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(starts, indices, last, *heads, page, q_data_type=dtype, kv_data_type=dtype)
    q = _random(torch, (count, case.num_heads, case.head_dim), dtype)
    pages = [
        _random(torch, (count * per_sequence, 2, case.num_kv_heads, page, case.head_dim), dtype)
        for _ in range(num_layers)
    ]

    def decode() -> None:
        for cache in pages:
            wrapper.run(q, cache)

    return decode


PEERS: dict[str, Prepare] = {
    "torch-flash": torch_sdpa("FLASH_ATTENTION", fold=False),
    "torch-flash-rows": torch_sdpa("FLASH_ATTENTION", fold=True),
    "torch-cudnn": torch_sdpa("CUDNN_ATTENTION", fold=False),
    "torch-cudnn-rows": torch_sdpa("CUDNN_ATTENTION", fold=True),
    "torch-flex": torch_flex,
    "flashinfer": flashinfer,
}


def _contiguous(target: Target, num_layers: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """q [S, Hq, n, D], and K and V [S, H, length, D] of each layer."""
    import torch

    case, dtype = target.case, getattr(torch, dtype_of(target))
    count, length = len(case.new), case.seq_lens[0]
    q = _random(torch, (count, case.num_heads, case.new[0], case.head_dim), dtype)
    shape = count, case.num_kv_heads, length, case.head_dim
    return q, [
        (_random(torch, shape, dtype), _random(torch, shape, dtype)) for _ in range(num_layers)
    ]


def _random(torch: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return torch.randn(shape, dtype=dtype, device="cuda")
