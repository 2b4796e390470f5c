"""What attend takes as arrays beside q: slopes, sinks, positions and masks, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore import checks
from kvcore.attend_options import AttendOptions, packed_mask, per_head, token_positions
from kvcore.backend import Plan, lies_on_device
from kvcore.errors import InvalidType
from kvcore_gpu import params
from kvcore_gpu.arrays import ALIGNMENT, dense
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.runtime import Runtime

_MOST_COMPARED = 1 << 20  # bytes


@dataclass(eq=False)
class Sent:
    """Positions and masks of a call, as they were checked and sent.

    Attributes:
        content: what tells whether another call has the same; None: nothing does.
        positions, mask, mask_offsets: on the host, None where not given or not looked at.
        addresses: by name, where each lies on the device.
        kept: the arrays of the device.
    """

    content: Any
    positions: NDArray[np.int32] | None
    mask: NDArray[np.uint8] | None
    mask_offsets: NDArray[np.int64] | None
    addresses: dict[str, int]
    kept: list[Any]


NOTHING = Sent(None, None, None, None, {}, [])


class OptionArrays:
    """Those of one cache. What comes from the host is sent once while it stays as it is, whatever
    the number of layers; slopes and sinks are kept for good.

    Args:
        launcher: of the device.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._sent: Sent | None = None

    def signature(self, plan: Plan, options: AttendOptions) -> Any:
        """Equal for calls with the same plan.device that these options give the same parameters."""
        numbers = options.scale, options.softcap, options.causal, options.window, options.exact
        slopes, sinks = options.alibi_slopes, options.sinks
        if options.positions is not None or options.mask is not None:
            own = self._known(plan, options) or object()
        elif slopes is None and sinks is None:
            return numbers
        else:
            own = None
        return numbers, self._signature_of(slopes), self._signature_of(sinks), own

    def floats(self, value: Any | None, argument: str, num_heads: int) -> tuple[int | None, Any]:
        """The address of one float32 for each query head, and what is to be kept for the launch."""
        if value is None:
            return None, None
        if lies_on_device(value):
            runtime = self._launcher.runtime
            array = _device_array(runtime, value, argument, np.float32)
            checks.shape(array.shape, (num_heads,), argument, "[Hq]")
            return runtime.address(array), array
        floats = per_head(value, argument, num_heads)
        assert floats is not None
        return self._launcher.constant(floats), None

    def send(self, plan: Plan, options: AttendOptions, look: bool) -> Sent:
        """Positions and masks on the device, checked.

        Args:
            look: positions of the device are copied to the host as well, which waits.
        """
        known = self._known(plan, options)
        if known is not None:
            return known
        runtime, positions = self._launcher.runtime, options.positions
        kept, addresses, seen = [], {}, None
        on_device = lies_on_device(positions)
        if on_device:
            array = _device_array(runtime, positions, "positions", np.int32)
            checks.shape(array.shape, (plan.num_tokens,), "positions", "[T]")
            addresses["positions"] = runtime.address(array)
            kept.append(array)
            seen = runtime.to_host(array) if look else None
        host = None if on_device else token_positions(positions, plan.num_tokens)
        mask, offsets = packed_mask(_on_host(runtime, options.mask), plan)
        parts = {"mask_offsets": offsets, "positions": host, "mask": mask}
        there = {name: part for name, part in parts.items() if part is not None}
        if there:
            array, places = _send(runtime, list(there.values()))
            kept.append(array)
            addresses.update(zip(there, places, strict=True))
        content = None if on_device else _content_of(plan, options)
        self._sent = Sent(content, seen if on_device else host, mask, offsets, addresses, kept)
        return self._sent

    def _known(self, plan: Plan, options: AttendOptions) -> Sent | None:
        """What was sent last, if it is the same; no graph can hold it, as it goes with the next."""
        sent = self._sent
        if sent is None or sent.content is None or sent.content != _content_of(plan, options):
            return None
        self._launcher.runtime.check_not_capturing()
        return sent

    def _signature_of(self, floats: Any) -> Any:
        """Of slopes or sinks."""
        if floats is None:
            return None
        if type(floats) is np.ndarray:
            return floats.shape, floats.dtype, floats.tobytes()
        runtime, own = self._launcher.runtime, floats
        if type(floats) is runtime.array_type and own.flags.c_contiguous:
            address = runtime.address(own)
            if address % ALIGNMENT == 0:
                return address, own.shape, own.dtype
        if type(floats) is list and all(type(value) is float for value in floats):
            return tuple(floats)
        return object()  # equal to no other


def put(fill: params.AttendParams, sent: Sent) -> None:
    """Writes where positions and masks lie, or that there are none."""
    for name in ("positions", "mask", "mask_offsets"):
        setattr(fill, name, sent.addresses.get(name))


def _content_of(plan: Plan, options: AttendOptions) -> Any:
    """What positions and masks hold, and the lengths that they are for.

    None: they are not NumPy's, or so many that it takes as long to compare them as to send them.
    """
    given = options.positions, *(() if options.mask is None else options.mask)
    content: list[Any] = [plan.query_starts.tobytes(), plan.seq_lens.tobytes()]
    left = _MOST_COMPARED
    for array in given:
        if array is None:
            content.append(None)
            continue
        if type(array) is not np.ndarray or array.nbytes > left:
            return None
        left -= array.nbytes
        content.append((array.shape, array.dtype, array.tobytes()))
    return content


def _device_array(runtime: Runtime, value: Any, argument: str, dtype: Any) -> Any:
    """A caller's dense array of the device; its values cannot be looked at without waiting."""
    array = runtime.as_array(value, argument)
    if array.dtype != dtype:
        raise InvalidType(f"{argument}: expected {np.dtype(dtype).name}, got {array.dtype.name}")
    return dense(runtime, array)


def _on_host(runtime: Runtime, mask: Any) -> Any:
    """A list of masks with those on the device copied to the host."""
    if mask is None or isinstance(mask, np.ndarray):
        return mask
    return [runtime.to_host(entry) if lies_on_device(entry) else entry for entry in mask]


def _send(runtime: Runtime, parts: list[NDArray[Any]]) -> tuple[Any, list[int]]:
    """Host arrays in one copy, each at a multiple of 8 bytes: the copy, and where each lies."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.nbytes // 8) * 8)
    staged = runtime.stage(starts.pop() // 4)
    memory = staged.view(np.uint8)
    for part, start in zip(parts, starts, strict=True):
        memory[start : start + part.nbytes] = part.reshape(-1).view(np.uint8)
    target = runtime.empty(staged.shape, np.int32)
    runtime.upload(staged, target)
    return target, [runtime.address(target) + start for start in starts]
