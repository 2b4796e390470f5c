"""A real model writes: prefill the prompt, then one sampled token a step, all out of the cache."""

import numpy as np

import kvcore
from kvcore.models import SamplingParams, load
from kvcore.models.sampling import Sampler

model = load("smollm2")
cache = kvcore.KVCache(model.cache_spec(k_format="fp32", v_format="fp32"), num_blocks=32)
prompt = model.tokenizer.encode("Once upon a time, there was a little girl named")


def write(params, num_tokens):
    """Continues the prompt by hand; `kvcore.models.generate` does the same for many prompts."""
    sampler, tokens = Sampler(params), list(prompt)
    sequence = cache.sequence()
    while len(tokens) < len(prompt) + num_tokens:
        new = np.asarray(tokens[len(sequence) :], np.int32)  # the whole prompt, then one token
        with cache.step([(sequence, new)]) as step:
            logits = model.decoder.forward(step, new)
        tokens.append(sampler.sample(logits[0]))
    sequence.free()
    return model.tokenizer.decode(tokens[len(prompt) :])


greedy = write(SamplingParams(), num_tokens=9)
print("greedy: ", greedy)
assert greedy == " Emma who loved to play in the sun."

params = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=7)
sampled = write(params, num_tokens=24)
print("sampled:", sampled)
assert sampled == write(params, num_tokens=24)  # a seed repeats itself
assert cache.stats().in_use == 0
