"""What the cache saves: the operations of a generation with it and without."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore import checks
from kvcore.planner.cost import visible_pairs
from kvcore.planner.model import Model


@dataclass(frozen=True)
class Work:
    """Operations of a generation by part; a multiply-add is two.

    Attributes:
        projections: Q, K, V and the output of attention.
        scores: q . k and the weighted values.
        mlp: the MLP or experts, routers included.
        head: the output head, once for each generated token.
    """

    projections: int
    scores: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.scores + self.mlp + self.head


@dataclass(frozen=True)
class Recompute:
    """A generation with a cache and without.

    Attributes:
        prompt, generated: tokens.
        cached: the prompt once, then each generated token alone.
        uncached: for each generated token the whole text before it again.
        cached_tokens, uncached_tokens: tokens that pass through the layers.
    """

    prompt: int
    generated: int
    cached: Work
    uncached: Work
    cached_tokens: int
    uncached_tokens: int

    @property
    def factor(self) -> float:
        """Operations without the cache over those with it."""
        return self.uncached.total / self.cached.total

    @property
    def factor_after_prompt(self) -> float:
        """Tokens that pass through the layers for each generated one after the first."""
        return (self.uncached_tokens - self.prompt) / max(1, self.cached_tokens - self.prompt)


def recompute(model: Model, prompt: int, generated: int, layers: int | None = None) -> Recompute:
    """Operations of a generation of `generated` tokens after a prompt.

    With n_t = prompt + t tokens before generated token t = 0 .. generated - 1:

        cached    the layers' products over n_(generated - 1) tokens, and every causal pair once
        uncached  over the sum of all n_t, and for each t every causal pair of n_t tokens

    A token costs 2 * weights in products and a (query, key) pair 2 * Hq * (D + Dv) a layer. The
    last token is generated, not fed.

    Args:
        model: the model.
        prompt, generated: tokens.
        layers: counts that many layers and no output head; None: the whole model.
    """
    checks.integer(prompt, "prompt", 1)
    checks.integer(generated, "generated", 1)
    lengths = range(prompt, prompt + generated)
    last = lengths[-1]
    whole = layers is None
    count = model.num_layers if layers is None else checks.integer(layers, "layers", 1)
    head = generated * 2 * model.vocab_size * model.hidden_size if whole else 0

    def work(tokens: int, texts: list[int]) -> Work:
        pair = 2 * model.num_heads * model.prompt_dims
        return Work(
            projections=tokens * count * 2 * model.attention_parameters,
            scores=sum(
                pair * visible_pairs(n, model.window(i)) for n in texts for i in range(count)
            ),
            mlp=tokens * sum(2 * _active_mlp(model, i) for i in range(count)),
            head=head,
        )

    return Recompute(
        prompt,
        generated,
        cached=work(last, [last]),
        uncached=work(sum(lengths), list(lengths)),
        cached_tokens=last,
        uncached_tokens=sum(lengths),
    )


def _active_mlp(model: Model, layer: int) -> int:
    experts = model.layer_experts(layer)
    idle = 0 if experts is None else experts.count - experts.per_token
    return model.mlp_parameters(layer) - idle * model.expert_parameters(layer)
