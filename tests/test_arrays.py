"""What callers may hand in: any library's arrays, read in place where their strides allow."""

from __future__ import annotations

import array
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcore
from kvcore import arrays
from kvcore._native import attention
from strategies import LAYOUTS
from support import BFLOAT16, DTYPES, assert_same_bits, make_cache, random_kv, random_q

REFUSALS = (kvcore.InvalidArgument, kvcore.InvalidType)


class Interface:
    """Offers __array_interface__ alone."""

    def __init__(self, wrapped):
        self.wrapped = wrapped
        self.__array_interface__ = wrapped.__array_interface__


class DLPack:
    """Offers DLPack alone."""

    def __init__(self, wrapped):
        self.wrapped = wrapped
        self.dtype = wrapped.dtype

    def __dlpack__(self, **options):
        return self.wrapped.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.wrapped.__dlpack_device__()


def buffer(wrapped):
    return memoryview(wrapped)


def run(k, v, q):
    """(out, k and v as stored) of one step; arrays as they are."""
    cache = make_cache(4)
    a = cache.sequence()
    with cache.step([(a, 20)]) as step:
        step.append(0, k, v)
        out = step.attend(0, q)
    return out, *a.read(0)


@pytest.fixture
def kvq():
    rng = np.random.default_rng(0)
    cache = make_cache(1)
    return *random_kv(rng, 20, cache.spec.layers[0]), random_q(rng, 20, 4, 16)


@pytest.mark.parametrize("wrap", [Interface, DLPack, buffer])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_of_any_library(kvq, wrap, dtype):
    kvq = [x.astype(dtype) for x in kvq]
    for actual, expected in zip(run(*map(wrap, kvq)), run(*kvq), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("wrap", [Interface, DLPack, buffer])
def test_are_not_copied(kvq, wrap):
    for value in kvq:
        seen = arrays.as_rows(wrap(value), "k")
        assert np.shares_memory(seen, value)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[3:9],
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: x[..., 8:],
        lambda x: np.broadcast_to(x[:, :1], x.shape),
    ],
)
def test_rows_with_a_dense_last_axis_are_not_copied(kvq, view):
    value = view(kvq[2])
    seen = arrays.as_rows(value, "q")
    assert np.shares_memory(seen, value) and seen.strides == value.strides


@pytest.mark.parametrize("kind", ["strided last axis", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_cannot_be_read_in_place_are_copied(kvq, kind, dtype):
    kvq = [x.astype(dtype) for x in kvq]
    odd = [oddly(x, kind) for x in kvq]
    assert all(not arrays.is_readable(x) for x in odd)
    for actual, expected in zip(run(*odd), run(*kvq), strict=True):
        assert actual.dtype.isnative
        assert_same_bits(actual, expected)


VIEWS = {
    "whole": lambda x: x,
    "reversed": lambda x: x[::-1],
    "short": lambda x: x[..., :-8],
    "strided last axis": lambda x: x[..., ::2],
    "of one axis less": lambda x: x[..., 0],
    "axes swapped": lambda x: x.swapaxes(0, 1),
    "broadcast": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "odd strides": lambda x: oddly(x, "unaligned"),
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
}


@given(st.data())
def test_the_quick_look_says_what_the_long_one_says(data):
    """Taken at once is what the explaining checks take too, in place."""
    arrays.dtype_number(np.zeros(0, BFLOAT16), "k")  # met once, it is taken at once
    cache = make_cache(8)
    news = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    step = cache.step([(cache.sequence(), n) for n in news])
    layout = data.draw(st.sampled_from(list(LAYOUTS)))
    sizes = {
        "S": data.draw(st.sampled_from([len(news), len(news) + 1])),
        "H": data.draw(st.sampled_from([2, 0, 1, 3, 4])),
        "D": data.draw(st.sampled_from([16, 24, 32])),
        "N": data.draw(st.sampled_from([step.num_tokens, max(news), max(news) + 1])),
    }
    sizes["T"] = sizes["N"]
    axes = {"NHD": "THD", "HND": "HTD", "BSHD": "SNHD", "BHSD": "SHND"}[layout]
    dtype = data.draw(st.sampled_from([*DTYPES.values(), np.dtype(np.float64)]))
    view = VIEWS[data.draw(st.sampled_from(list(VIEWS)))]
    value = view(np.zeros([sizes[axis] for axis in axes], dtype))
    grouped = data.draw(st.booleans())
    plan, (blocks, _) = step.plan(), cache._storage.layers[0]
    fits = attention.fits(plan, value, arrays.LAYOUTS[layout], blocks, grouped)
    assert fits == taken_in_place(value, layout, plan, grouped)


def taken_in_place(value, layout, plan, grouped):
    """Whether the checks that explain take `value`, and without a copy."""
    try:
        rows = arrays.as_rows(value, "k")
        arrays.check_rows(rows, "k", layout, plan, 2, 16, grouped)
    except REFUSALS:
        return False
    return rows is value


def oddly(value, kind):
    """`value`'s numbers in an array that the core cannot read."""
    if kind == "strided last axis":
        result = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)[..., ::2]
    else:
        memory = np.zeros(value.nbytes + 1, np.uint8)[1:]
        result = memory.view(value.dtype).reshape(value.shape)
    result[...] = value
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_other_byte_order_are_refused(kvq, dtype):
    value = kvq[0].astype(DTYPES[dtype])
    with pytest.raises(kvcore.InvalidType, match="k: expected float32"):
        arrays.as_rows(value.astype(value.dtype.newbyteorder()), "k")


def test_read_only_arrays_are_read(kvq):
    for value in kvq:
        value.flags.writeable = False
    run(*kvq)


def test_a_bfloat16_tensor_that_speaks_dlpack(kvq, monkeypatch):
    """NumPy reads no bfloat16 by DLPack; the bits travel as int16, by the tensor's own `view`."""
    library = types.ModuleType("tensors")
    library.int16 = np.int16
    monkeypatch.setitem(__import__("sys").modules, "tensors", library)

    class Tensor(DLPack):
        def view(self, dtype):
            return Tensor(self.wrapped.view(dtype))

        def __dlpack__(self, **options):
            if self.dtype == BFLOAT16:
                raise BufferError("bfloat16")
            return super().__dlpack__(**options)

    Tensor.__module__ = "tensors.core"
    kvq = [x.astype(BFLOAT16) for x in kvq]
    out, *stored = run(*map(Tensor, kvq))
    expected, *expected_stored = run(*kvq)
    assert out.dtype == BFLOAT16
    for actual, wanted in zip([out, *stored], [expected, *expected_stored], strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_mix_of_dtypes(kvq, dtype):
    """K, V and q each have their own; out has q's."""
    k, v, q = kvq
    for other in DTYPES.values():
        out, stored_k, stored_v = run(k.astype(DTYPES[dtype]), v.astype(other), q.astype(other))
        assert out.dtype == other
        assert_same_bits(stored_k, k.astype(DTYPES[dtype]).astype(np.float32))
        assert_same_bits(stored_v, v.astype(other).astype(np.float32))


@pytest.mark.parametrize(
    "dtype",
    [">f4", ">f2", "float64", "int32", "int8", "uint16", "bool", "complex64", "S4", "object"],
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(kvcore.InvalidType, match=r"^x: .*float32, float16 or bfloat16"):
        arrays.as_rows(np.zeros((2, 2, 8), dtype), "x")


@pytest.mark.parametrize("value", [None, 1.0, "text", [[1.0]], object(), {}])
def test_other_objects_are_refused(value):
    with pytest.raises(kvcore.InvalidType, match=r"^x: expected an array"):
        arrays.as_array(value, "x")


class TestTokenIds:
    @pytest.mark.parametrize(
        "tokens",
        [
            [1, 2, 3],
            (1, 2, 3),
            np.array([1, 2, 3]),
            np.array([1, 2, 3], np.uint8),
            np.array([1, 2, 3], ">i4"),
            np.array([1, 9, 2, 9, 3])[::2],
            array.array("i", [1, 2, 3]),
            Interface(np.array([1, 2, 3])),
            DLPack(np.array([1, 2, 3], np.uint64)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_are_taken_from(self, tokens):
        ids = arrays.as_token_ids(tokens, "tokens")
        assert ids.dtype == np.int32 and ids.flags.c_contiguous and ids.tolist() == [1, 2, 3]

    @pytest.mark.parametrize("tokens", [[], (), np.array([], np.int32), np.array([])])
    def test_may_be_none(self, tokens):
        assert arrays.as_token_ids(tokens, "tokens").shape == (0,)

    @pytest.mark.parametrize(
        "tokens",
        [[1.5], [True], [[1, 2]], ["a"], [-1], [2**31], [2**63], 5, None, "abc", [1, None]],
        ids=repr,
    )
    def test_are_not_taken_from(self, tokens):
        with pytest.raises(
            (kvcore.InvalidArgument, kvcore.InvalidType), match=r"^tokens: expected"
        ):
            arrays.as_token_ids(tokens, "tokens")

    def test_of_the_whole_range(self):
        assert arrays.as_token_ids([0, 2**31 - 1], "tokens").tolist() == [0, 2**31 - 1]
