"""Requests join and leave between steps, prompts ride along with decodes, no text changes.

The "model" is one layer of attention over random embeddings: enough to make every token depend on
all before it.
"""

from collections import deque

import numpy as np

import kvcore

VOCAB, NUM_HEADS, HEAD_DIM, MAX_BATCH, CHUNK = 97, 2, 32, 3, 24

rng = np.random.default_rng(0)
embedding = rng.standard_normal((VOCAB, NUM_HEADS, HEAD_DIM), np.float32)
head = rng.standard_normal((VOCAB, NUM_HEADS * HEAD_DIM), np.float32)
spec = kvcore.CacheSpec(1, NUM_HEADS, HEAD_DIM, block_size=16, k_format="fp32", v_format="fp32")


class Request:
    def __init__(self, prompt, num_tokens):
        self.tokens, self.length, self.sequence = list(prompt), len(prompt) + num_tokens, None

    @property
    def pending(self):
        return np.asarray(self.tokens[len(self.sequence) :][:CHUNK], np.int32)


def serve(requests, max_batch):
    """Runs all requests to their end; returns how many ran in each step."""
    cache = kvcore.KVCache(spec, num_blocks=32)
    waiting, running, batch_sizes = deque(requests), [], []
    while waiting or running:
        while waiting and len(running) < max_batch:
            running.append(waiting.popleft())
            running[-1].sequence = cache.sequence()
        batch = [(request.sequence, request.pending) for request in running]
        tokens = np.concatenate([new for _, new in batch])
        with cache.step(batch) as step:
            step.append(0, embedding[tokens], embedding[tokens])
            out = step.attend(0, embedding[tokens])[step.query_starts[1:] - 1]
        chosen = kvcore.ops.linear(out.reshape(len(batch), -1), head).argmax(axis=1)
        for request, token in zip(list(running), chosen, strict=True):
            if len(request.sequence) == len(request.tokens):  # its prompt is behind it
                request.tokens.append(int(token))
            if len(request.tokens) == request.length:
                request.sequence.free()
                running.remove(request)
        batch_sizes.append(len(batch))
    assert cache.stats().in_use == 0
    return batch_sizes


jobs = [(rng.integers(VOCAB, size=n), m) for n, m in ((5, 30), (60, 8), (17, 12), (3, 20), (40, 5))]
batched = [Request(*job) for job in jobs]
print("requests in each step:", *serve(batched, MAX_BATCH))
for job, request in zip(jobs, batched, strict=True):
    alone = Request(*job)
    serve([alone], max_batch=1)
    assert request.tokens == alone.tokens
print("every request got the tokens that it gets alone")
