"""Families of decoders: how each writes its config.json and where it keeps its weights."""

from __future__ import annotations

from kvcore.models.families.deepseek import DeepseekV2, DeepseekV3
from kvcore.models.families.gemma2 import Gemma2
from kvcore.models.families.gemma3 import Gemma3
from kvcore.models.families.gpt2 import Gpt2
from kvcore.models.families.gpt_oss import GptOss
from kvcore.models.families.llama import Llama
from kvcore.models.families.mistral import Mistral
from kvcore.models.families.phi3 import Phi3
from kvcore.models.families.qwen import Qwen2, Qwen3

FAMILIES: dict[str, Llama] = {
    family.model_type: family
    for family in (
        Llama(),
        Mistral(),
        Qwen2(),
        Qwen3(),
        Gemma2(),
        Gemma3(),
        GptOss(),
        Phi3(),
        Gpt2(),
        DeepseekV2(),
        DeepseekV3(),
    )
}
