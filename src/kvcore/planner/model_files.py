"""A Model from a config.json or a GGUF file, of any decoder that names its sizes as usual."""

from __future__ import annotations

from pathlib import Path

from kvcore.errors import InvalidArgument, ModelFileError
from kvcore.models.files import Fields
from kvcore.models.gguf import GGUFFile
from kvcore.models.hf import CONFIG, read_json
from kvcore.planner.model import Experts, Latent, Model

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
#: What families do that their config.json does not say.
_QKV_BIAS = frozenset({"qwen2", "qwen2_moe", "gpt2"})
_QK_NORM = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2"})
_POST_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
_TIED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2"})
_SINKS = frozenset({"gpt_oss"})
_GPT2_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def read_model(path: str | Path) -> Model:
    """The model that a directory with a config.json, such a file, or a GGUF file describes.

    Raises:
        ModelFileError: it is not there, or lacks a size; the message names file and key.
        MissingExtra: a GGUF file, and the package that reads it is not installed.
    """
    place = Path(path)
    file = place / CONFIG if place.is_dir() else place
    if not file.exists():
        raise ModelFileError(
            f"{file}: a directory with a {CONFIG}, such a file or a .gguf file expected, "
            "but there is no such file"
        )
    try:
        if file.suffix == ".gguf":
            return _from_gguf(file)
        return _from_config(file.resolve().parent.name, file)
    except InvalidArgument as error:
        raise ModelFileError(f"{file}: {error}") from error


# ---- config.json


def _from_config(name: str, file: Path) -> Model:
    values = read_json(file)
    # Models that see or hear keep their decoder's numbers apart.
    text = values.get("text_config")
    if isinstance(text, dict):
        values = {"model_type": values.get("model_type"), **text}
    kind = str(values.get("model_type", ""))
    if kind == "gpt2":
        values = {**values, **{new: values.get(old) for new, old in _GPT2_NAMES.items()}}
        values["intermediate_size"] = values["intermediate_size"] or 4 * values["hidden_size"]
    fields = Fields(file, values)
    hidden = fields.positive("hidden_size")
    heads = fields.positive("num_attention_heads")
    latent = _latent(fields)
    kv_heads = 1 if latent else fields.positive("num_key_value_heads", heads)
    head_dim = fields.positive("head_dim", hidden // heads)
    if latent:
        head_dim = latent.kv_rank + latent.rope_dim
    plain = kind == "gpt2"
    attention_bias = fields.typed("attention_bias", bool, plain)
    return Model(
        name,
        num_layers=fields.positive("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.positive("intermediate_size", 4 * hidden),
        vocab_size=fields.positive("vocab_size"),
        max_context=fields.positive("max_position_embeddings", 2048),
        windows=_windows(fields, kind),
        latent=latent,
        experts=_experts(fields, kind),
        gated=not plain,
        tied_head=fields.typed("tie_word_embeddings", bool, kind in _TIED),
        qkv_bias=attention_bias or kind in _QKV_BIAS,
        output_bias=attention_bias,
        mlp_bias=fields.typed("mlp_bias", bool, plain),
        qk_norm=kind in _QK_NORM,
        post_norms=kind in _POST_NORMS,
        sinks=kind in _SINKS,
        layer_norm=plain,
        learned_positions=fields.positive("max_position_embeddings") if plain else 0,
        dtype=_dtype(fields),
        source=str(file),
    )


def _dtype(fields: Fields) -> str:
    name = str(fields.get("torch_dtype", fields.get("dtype", "bfloat16")))
    return _DTYPES.get(name.removeprefix("torch."), "bf16")


def _latent(fields: Fields) -> Latent | None:
    if fields.get("kv_lora_rank") is None:
        return None
    return Latent(
        q_rank=fields.nullable("q_lora_rank", int, None),
        kv_rank=fields.positive("kv_lora_rank"),
        nope_dim=fields.positive("qk_nope_head_dim"),
        rope_dim=fields.positive("qk_rope_head_dim"),
        value_dim=fields.positive("v_head_dim"),
    )


def _experts(fields: Fields, kind: str) -> Experts | None:
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    count = next((fields.positive(name) for name in names if fields.get(name)), None)
    if count is None:
        return None
    width = fields.positive("moe_intermediate_size", fields.positive("intermediate_size"))
    return Experts(
        count,
        fields.positive("num_experts_per_tok"),
        width,
        first_layer=fields.typed("first_k_dense_replace", int, 0),
        shared_size=width * fields.typed("n_shared_experts", int, 0),
        bias=kind == "gpt_oss",
        choice_bias=kind == "deepseek_v3",
    )


def _windows(fields: Fields, kind: str) -> tuple[int | None, ...]:
    window = fields.nullable("sliding_window", int, None)
    if window is None or not fields.typed("use_sliding_window", bool, True):
        return (None,)
    types = fields.get("layer_types")
    if isinstance(types, list) and types:
        return tuple(window if name == "sliding_attention" else None for name in types)
    count = fields.positive("num_hidden_layers")
    if kind == "gemma2":
        return (window, None)
    if kind in ("gemma3", "gemma3_text"):
        period = fields.positive("sliding_window_pattern", 6)
        return tuple(None if (i + 1) % period == 0 else window for i in range(count))
    if kind == "gpt_oss":
        return (window, None)
    if kind.startswith("qwen"):
        first = fields.typed("max_window_layers", int, count)
        return tuple(window if i >= first else None for i in range(count))
    return (window,)


# ---- GGUF


def _from_gguf(file: Path) -> Model:
    gguf = GGUFFile(file)
    fields = Fields(file, gguf.metadata)
    arch = fields.typed("general.architecture", str)
    shapes = gguf.shapes

    def positive(key: str, default: int | None = None) -> int:
        return fields.positive(f"{arch}.{key}", default)

    hidden, heads = positive("embedding_length"), positive("attention.head_count")
    layers = positive("block_count")
    latent = _gguf_latent(fields, arch)
    kv_heads = 1 if latent else positive("attention.head_count_kv", heads)
    head_dim = positive("attention.key_length", hidden // heads)
    if latent:
        head_dim = latent.kv_rank + latent.rope_dim
    count = fields.typed(f"{arch}.expert_count", int, 0)
    vocab = next((shape[0] for n, shape in shapes.items() if n == "token_embd.weight"), 0)
    window = fields.typed(f"{arch}.attention.sliding_window", int, 0)
    period = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}.get(arch, 1)
    return Model(
        file.stem,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        intermediate_size=positive("feed_forward_length", 4 * hidden),
        vocab_size=vocab or positive("vocab_size"),
        max_context=positive("context_length"),
        windows=_gguf_windows(window, period),
        latent=latent,
        experts=_gguf_experts(fields, arch) if count else None,
        gated="blk.0.ffn_gate.weight" in shapes or bool(count),
        tied_head="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        post_norms="blk.0.post_attention_norm.weight" in shapes,
        sinks="blk.0.attn_sinks.weight" in shapes,
        layer_norm="blk.0.attn_norm.bias" in shapes,
        learned_positions=shapes.get("position_embd.weight", (0,))[0],
        dtype="bf16",
        source=str(file),
    )


def _gguf_windows(window: int, period: int) -> tuple[int | None, ...]:
    if not window:
        return (None,)
    return (window,) * max(1, period - 1) + ((None,) if period > 1 else ())


def _gguf_latent(fields: Fields, arch: str) -> Latent | None:
    if not fields.get(f"{arch}.attention.kv_lora_rank"):
        return None
    rope = fields.positive(f"{arch}.rope.dimension_count")
    key = fields.positive(
        f"{arch}.attention.key_length_mla", fields.positive(f"{arch}.attention.key_length")
    )
    return Latent(
        q_rank=fields.nullable(f"{arch}.attention.q_lora_rank", int, None),
        kv_rank=fields.positive(f"{arch}.attention.kv_lora_rank"),
        nope_dim=key - rope,
        rope_dim=rope,
        value_dim=fields.positive(
            f"{arch}.attention.value_length_mla",
            fields.positive(f"{arch}.attention.value_length"),
        ),
    )


def _gguf_experts(fields: Fields, arch: str) -> Experts:
    width = fields.positive(
        f"{arch}.expert_feed_forward_length", fields.positive(f"{arch}.feed_forward_length")
    )
    return Experts(
        fields.positive(f"{arch}.expert_count"),
        fields.positive(f"{arch}.expert_used_count"),
        width,
        first_layer=fields.typed(f"{arch}.leading_dense_block_count", int, 0),
        shared_size=width * fields.typed(f"{arch}.expert_shared_count", int, 0),
    )
