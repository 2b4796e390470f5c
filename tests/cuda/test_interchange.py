"""Arrays of other libraries on a real device, read and written where they lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvcore

pytestmark = pytest.mark.gpu

TOKENS, SPEC = 20, kvcore.CacheSpec(1, 2, 64, k_format="bf16", v_format="bf16", block_size=16)


def on_the_cpu(k: Any, v: Any, q: Any) -> Any:
    """The same step by the CPU's backend, of float32 arrays."""
    cache = kvcore.KVCache(SPEC, 2, backend="cpu")
    with cache.step([(cache.sequence(), TOKENS)]) as step:
        step.append(0, k, v)
        return step.attend(0, q)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_tensors_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    dtype = getattr(torch, name)
    k, v, q = (
        torch.randn((TOKENS, heads, 64), device="cuda").to(dtype).contiguous()
        for heads in (2, 2, 4)
    )
    out = torch.full_like(q, float("nan"))
    cache = kvcore.KVCache(SPEC, 2, backend="cuda")
    with cache.step([(cache.sequence(), TOKENS)]) as step:
        step.append(0, k, v)
        assert step.attend(0, q, out=out) is out
        fresh = step.attend(0, q)
    torch.cuda.synchronize()
    expected = on_the_cpu(*(x.float().cpu().numpy() for x in (k, v, q)))
    np.testing.assert_allclose(out.float().cpu().numpy(), expected, rtol=0, atol=3e-2)
    assert torch.equal(torch.from_dlpack(fresh), out)


def test_an_array_interface() -> None:
    import cupy

    rng = np.random.default_rng(0)
    k, v, q = (rng.standard_normal((TOKENS, heads, 64), np.float32) for heads in (2, 2, 4))
    kept = [cupy.asarray(x) for x in (k, v, q)]
    given = [SimpleNamespace(__cuda_array_interface__=x.__cuda_array_interface__) for x in kept]
    cache = kvcore.KVCache(SPEC, 2, backend="cuda")
    with cache.step([(cache.sequence(), TOKENS)]) as step:
        step.append(0, *given[:2])
        out = step.attend(0, given[2])
    np.testing.assert_allclose(out.get(), on_the_cpu(k, v, q), rtol=0, atol=2e-2)


def test_rows_that_lie_at_odd_places_are_copied() -> None:
    import cupy

    rng = np.random.default_rng(0)
    k, v, q = (rng.standard_normal((TOKENS, heads, 72), np.float32) for heads in (2, 2, 4))
    cache = kvcore.KVCache(SPEC, 2, backend="cuda")
    with cache.step([(cache.sequence(), TOKENS)]) as step:
        step.append(0, *(cupy.asarray(x)[..., 1:65] for x in (k, v)))
        out = step.attend(0, cupy.asarray(q)[..., 3:67])
    expected = on_the_cpu(k[..., 1:65], v[..., 1:65], q[..., 3:67])
    np.testing.assert_allclose(out.get(), expected, rtol=0, atol=2e-2)
