"""Language models on kvcore: a client of the public interface, with no ML framework."""

from __future__ import annotations

from kvcore.models.completion import Completion, Metrics, TokenEvent
from kvcore.models.config import ClampedSwiglu, Experts, LatentAttention, ModelConfig
from kvcore.models.decoder import Decoder
from kvcore.models.device import Device
from kvcore.models.generation import generate, stream
from kvcore.models.generator import Generator
from kvcore.models.model import Model, load
from kvcore.models.rope import FrequencyFactors, LinearScaling, Llama3Scaling, Rope, YarnScaling
from kvcore.models.sampling import SamplingParams
from kvcore.models.scheduler import Request, Scheduler, Work
from kvcore.models.tokenizer import Tokenizer, TokenStream
from kvcore.models.weights import DecoderWeights, LayerWeights

__all__ = [
    "ClampedSwiglu",
    "Completion",
    "Decoder",
    "DecoderWeights",
    "Device",
    "Experts",
    "FrequencyFactors",
    "Generator",
    "LatentAttention",
    "LayerWeights",
    "LinearScaling",
    "Llama3Scaling",
    "Metrics",
    "Model",
    "ModelConfig",
    "Request",
    "Rope",
    "SamplingParams",
    "Scheduler",
    "TokenEvent",
    "TokenStream",
    "Tokenizer",
    "Work",
    "YarnScaling",
    "generate",
    "load",
    "stream",
]
