"""Where the weights of a checkpoint are: tensors, and how they become the decoder's arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]


def _as_it_is(values: FloatArray) -> FloatArray:
    return values


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, which fills some rows of one of the decoder's arrays.

    Attributes:
        name: in the file.
        shape: in the file.
        pick: makes the rows of the array of the file's values.
        picked: the shape of these rows; () when it is `shape`.
        center: what the file's values lie around: 1 for the weight of a norm.
    """

    name: str
    shape: tuple[int, ...]
    pick: Callable[[FloatArray], FloatArray] = _as_it_is
    picked: tuple[int, ...] = ()
    center: float = 0.0

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return self.picked or self.shape

    @property
    def is_whole(self) -> bool:
        """Whether the rows are the file's values as they are."""
        return self.pick is _as_it_is


# By the field of `DecoderWeights` or `LayerWeights`: the tensors that fill it, one below the other.
Tensors: TypeAlias = Mapping[str, list[Tensor]]


def shape_of(pieces: list[Tensor]) -> tuple[int, ...]:
    """The shape of the array that these tensors fill together."""
    return (sum(piece.part[0] for piece in pieces), *pieces[0].part[1:])


def transposed(name: str, inputs: int, outputs: int) -> Tensor:
    """A matrix that a file holds as [inputs, outputs]."""
    return Tensor(name, (inputs, outputs), np.transpose, (outputs, inputs))


def rms_norm(name: str, size: int) -> Tensor:
    """The weight of an RMSNorm."""
    return Tensor(name, (size,), center=1.0)


def layer_norm(name: str, size: int) -> list[Tensor]:
    """The weight and the bias of a LayerNorm, as the rows of one array."""

    def row(part: str, center: float) -> Tensor:
        return Tensor(f"{name}.{part}", (size,), lambda values: values[None], (1, size), center)

    return [row("weight", 1.0), row("bias", 0.0)]
