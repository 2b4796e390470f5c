"""The built-in models, from the config.json that each publisher gives with the weights."""

from __future__ import annotations

from typing import Any

from kvcore.planner.model import Experts, Latent, Model
from kvcore.planner.names import find


def _llama(
    name: str,
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    mlp: int,
    vocab: int,
    context: int,
    *,
    head_dim: int = 128,
    **others: Any,
) -> Model:
    """A model of Llama's shape; heads are (query heads, KV heads)."""
    fields: dict[str, Any] = {"source": f"config.json of {name}"} | others
    return Model(
        name, layers, hidden, heads[0], heads[1], head_dim, mlp, vocab, context,
        **fields,
    )  # fmt: skip


_QWEN2: dict[str, Any] = {"qkv_bias": True}
_QWEN3: dict[str, Any] = {"qk_norm": True}
_GEMMA2: dict[str, Any] = {"tied_head": True, "post_norms": True, "windows": (4096, None)}
_GEMMA3: dict[str, Any] = {"tied_head": True, "post_norms": True, "qk_norm": True}
_GPT_OSS: dict[str, Any] = {
    "qkv_bias": True, "output_bias": True, "sinks": True, "windows": (128, None), "head_dim": 64,
}  # fmt: skip


def _gemma3_windows(window: int) -> tuple[int | None, ...]:
    return (window,) * 5 + (None,)


_MODELS = (
    _llama("llama-2-7b", 32, 4096, (32, 32), 11008, 32000, 4096, dtype="fp16"),
    _llama("llama-2-13b", 40, 5120, (40, 40), 13824, 32000, 4096, dtype="fp16"),
    _llama("llama-2-70b", 80, 8192, (64, 8), 28672, 32000, 4096, dtype="fp16"),
    _llama("llama-3-8b", 32, 4096, (32, 8), 14336, 128256, 8192),
    _llama("llama-3-70b", 80, 8192, (64, 8), 28672, 128256, 8192),
    _llama("llama-3.1-405b", 126, 16384, (128, 8), 53248, 128256, 131072),
    _llama("mistral-7b", 32, 4096, (32, 8), 14336, 32000, 32768, windows=(4096,)),
    _llama("mixtral-8x7b", 32, 4096, (32, 8), 14336, 32000, 32768, experts=Experts(8, 2, 14336)),
    _llama("qwen2.5-0.5b", 24, 896, (14, 2), 4864, 151936, 32768,
           head_dim=64, tied_head=True, **_QWEN2),
    _llama("qwen2.5-1.5b", 28, 1536, (12, 2), 8960, 151936, 131072, tied_head=True, **_QWEN2),
    _llama("qwen2.5-7b", 28, 3584, (28, 4), 18944, 152064, 131072, **_QWEN2),
    _llama("qwen2.5-14b", 48, 5120, (40, 8), 13824, 152064, 131072, **_QWEN2),
    _llama("qwen2.5-32b", 64, 5120, (40, 8), 27648, 152064, 131072, **_QWEN2),
    _llama("qwen2.5-72b", 80, 8192, (64, 8), 29568, 152064, 131072, **_QWEN2),
    _llama("qwen3-0.6b", 28, 1024, (16, 8), 3072, 151936, 40960, tied_head=True, **_QWEN3),
    _llama("qwen3-4b", 36, 2560, (32, 8), 9728, 151936, 40960, tied_head=True, **_QWEN3),
    _llama("qwen3-8b", 36, 4096, (32, 8), 12288, 151936, 40960, **_QWEN3),
    _llama("qwen3-14b", 40, 5120, (40, 8), 17408, 151936, 40960, **_QWEN3),
    _llama("qwen3-32b", 64, 5120, (64, 8), 25600, 151936, 40960, **_QWEN3),
    _llama("qwen3-30b-a3b", 48, 2048, (32, 4), 6144, 151936, 40960,
           experts=Experts(128, 8, 768), **_QWEN3),
    _llama("qwen3-235b-a22b", 94, 4096, (64, 4), 12288, 151936, 40960,
           experts=Experts(128, 8, 1536), **_QWEN3),
    _llama("gemma-2-2b", 26, 2304, (8, 4), 9216, 256000, 8192, head_dim=256, **_GEMMA2),
    _llama("gemma-2-9b", 42, 3584, (16, 8), 14336, 256000, 8192, head_dim=256, **_GEMMA2),
    _llama("gemma-2-27b", 46, 4608, (32, 16), 36864, 256000, 8192, **_GEMMA2),
    _llama("gemma-3-1b", 26, 1152, (4, 1), 6912, 262144, 32768,
           head_dim=256, windows=_gemma3_windows(512), **_GEMMA3),
    _llama("gemma-3-4b", 34, 2560, (8, 4), 10240, 262208, 131072,
           head_dim=256, windows=_gemma3_windows(1024), **_GEMMA3),
    _llama("gemma-3-12b", 48, 3840, (16, 8), 15360, 262208, 131072,
           head_dim=256, windows=_gemma3_windows(1024), **_GEMMA3),
    _llama("gemma-3-27b", 62, 5376, (32, 16), 21504, 262208, 131072,
           windows=_gemma3_windows(1024), **_GEMMA3),
    _llama("phi-3-mini", 32, 3072, (32, 32), 8192, 32064, 4096, head_dim=96, windows=(2047,)),
    _llama("phi-3-medium", 40, 5120, (40, 10), 17920, 32064, 4096, windows=(2047,)),
    _llama("gpt2", 12, 768, (12, 12), 3072, 50257, 1024,
           head_dim=64, gated=False, tied_head=True, qkv_bias=True, output_bias=True,
           mlp_bias=True, layer_norm=True, learned_positions=1024, dtype="fp32"),
    _llama("gpt-oss-20b", 24, 2880, (64, 8), 2880, 201088, 131072,
           experts=Experts(32, 4, 2880, bias=True), **_GPT_OSS),
    _llama("gpt-oss-120b", 36, 2880, (64, 8), 2880, 201088, 131072,
           experts=Experts(128, 4, 2880, bias=True), **_GPT_OSS),
    _llama("deepseek-v2", 60, 5120, (128, 1), 12288, 102400, 163840, head_dim=576,
           latent=Latent(1536, 512, 128, 64, 128),
           experts=Experts(160, 6, 1536, first_layer=1, shared_size=2 * 1536)),
    _llama("deepseek-v2-lite", 27, 2048, (16, 1), 10944, 102400, 163840, head_dim=576,
           latent=Latent(None, 512, 128, 64, 128),
           experts=Experts(64, 6, 1408, first_layer=1, shared_size=2 * 1408)),
    _llama("deepseek-v3", 61, 7168, (128, 1), 18432, 129280, 163840, head_dim=576,
           latent=Latent(1536, 512, 128, 64, 128),
           experts=Experts(256, 8, 2048, first_layer=3, shared_size=2048, choice_bias=True)),
    _llama("smollm2-135m", 30, 576, (9, 3), 1536, 49152, 8192, head_dim=64, tied_head=True),
    _llama("smollm2-360m", 32, 960, (15, 5), 2560, 49152, 8192, head_dim=64, tied_head=True),
    _llama("smollm2-1.7b", 24, 2048, (32, 32), 8192, 49152, 8192, head_dim=64, tied_head=True),
    _llama("gpt-4-class", 120, 12288, (96, 8), 36864, 100256, 131072, gated=False,
           experts=Experts(16, 2, 36864), assumed=True,
           source="an assumption: about 1.8e12 parameters in 16 experts, of which a token takes 2, "
                  "and 8 KV heads; nothing is published"),
)  # fmt: skip

#: The built-in models by name.
MODELS = {model.name: model for model in _MODELS}


def get_model(name: str) -> Model:
    """A built-in model.

    Raises:
        InvalidArgument: there is none of this name; the message has the nearest ones.
    """
    return find(MODELS, name, "model")
