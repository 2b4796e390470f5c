"""How memory grows, what fits, and what bounds a step: numbers from the cache's own arithmetic."""

from __future__ import annotations

from kvcore.planner.answers import Plan, plan
from kvcore.planner.capacity import (
    RESERVE,
    Waste,
    kv_room,
    longest_context,
    most_sequences,
    waste,
)
from kvcore.planner.cost import Cost, StepCost, decode_attention, decode_step, prefill
from kvcore.planner.device import DEVICES, Device, get_device
from kvcore.planner.model import Experts, Latent, Model
from kvcore.planner.model_files import read_model
from kvcore.planner.models import MODELS, get_model
from kvcore.planner.offloading import Offload, offload
from kvcore.planner.parallel import Split, splits
from kvcore.planner.savings import Recompute, Work, recompute
from kvcore.planner.sizes import (
    Blocks,
    Growth,
    LayerBytes,
    Memory,
    ScoreMemory,
    activation_bytes,
    blocks_for,
    growth,
    layer_bytes,
    memory,
    score_memory,
)
from kvcore.planner.strategies import Strategy, compare

__all__ = [
    "DEVICES",
    "MODELS",
    "RESERVE",
    "Blocks",
    "Cost",
    "Device",
    "Experts",
    "Growth",
    "Latent",
    "LayerBytes",
    "Memory",
    "Model",
    "Offload",
    "Plan",
    "Recompute",
    "ScoreMemory",
    "Split",
    "StepCost",
    "Strategy",
    "Waste",
    "Work",
    "activation_bytes",
    "blocks_for",
    "compare",
    "decode_attention",
    "decode_step",
    "get_device",
    "get_model",
    "growth",
    "kv_room",
    "layer_bytes",
    "longest_context",
    "memory",
    "most_sequences",
    "offload",
    "plan",
    "prefill",
    "read_model",
    "recompute",
    "score_memory",
    "splits",
    "waste",
]
