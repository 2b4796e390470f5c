from typing import Any

from numpy.typing import NDArray

def quantize(
    rows: NDArray[Any],
    dtype: int,
    format: int,
    bias: NDArray[Any] | None,
    scales: NDArray[Any] | None,
    out: NDArray[Any],
) -> None: ...
def dequantize(
    codes: NDArray[Any],
    format: int,
    dtype: int,
    bias: NDArray[Any] | None,
    scales: NDArray[Any] | None,
    out: NDArray[Any],
) -> None: ...
