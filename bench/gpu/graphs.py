"""Times of CUDA graphs: what a call costs the device, without Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

WARM_UP = 3


def cupy_seconds(cp: Any, run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each replay of what `run` launches on the current stream."""
    stream = cp.cuda.get_current_stream()
    for _ in range(2):
        run()
    stream.synchronize()
    stream.begin_capture()
    try:
        run()
    finally:
        graph = stream.end_capture()
    return replay_seconds(cp, graph, repeats)


def replay_seconds(cp: Any, graph: Any, repeats: int) -> list[float]:
    """Seconds of each replay of a captured graph on the current stream."""
    stream = cp.cuda.get_current_stream()
    events = [(cp.cuda.Event(), cp.cuda.Event()) for _ in range(repeats)]
    for _ in range(WARM_UP):
        graph.launch(stream)
    for begin, end in events:
        begin.record(stream)
        graph.launch(stream)
        end.record(stream)
    stream.synchronize()
    return [cp.cuda.get_elapsed_time(begin, end) / 1e3 for begin, end in events]


def call_seconds(cp: Any, run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each call of what CuPy lets no graph hold: its products of matrices. The calls are
    to be so long that launching them costs nothing."""
    stream = cp.cuda.get_current_stream()
    for _ in range(WARM_UP):
        run()
    events = [cp.cuda.Event() for _ in range(repeats + 1)]
    events[0].record(stream)
    for event in events[1:]:
        run()
        event.record(stream)
    stream.synchronize()
    return [cp.cuda.get_elapsed_time(*pair) / 1e3 for pair in pairwise(events)]


def torch_seconds(torch: Any, run: Callable[[], None], repeats: int) -> list[float]:
    """The same by PyTorch's graphs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for _ in range(WARM_UP):
        graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def summary(seconds: list[float], calls: int) -> dict[str, float]:
    """Seconds of one of the `calls` of a replay: the median, and the best and worst replay."""
    return {
        "seconds": statistics.median(seconds) / calls,
        "best": min(seconds) / calls,
        "worst": max(seconds) / calls,
        "replays": len(seconds),
    }
