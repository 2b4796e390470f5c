"""Generation over a real cache with a model whose right answer is known."""

from __future__ import annotations

import pytest

from counting_model import ALPHABET, EOS, VOCAB, CountingModel, continuation
from kvcore.errors import InvalidArgument, InvalidType, OutOfBlocks
from kvcore.models.generation import generate, stream
from kvcore.models.generator import Generator
from kvcore.models.sampling import SamplingParams


def text_of(tokens):
    return "".join(ALPHABET[token] for token in tokens if token != EOS)


def test_a_ragged_batch_gives_the_right_tokens(model, make_cache, draw_prompts):
    prompts = draw_prompts(12, 1, 120)
    done = generate(model, prompts, max_tokens=60, cache=make_cache(128), max_batch=5)
    assert [c.index for c in done] == list(range(12))
    for prompt, completion in zip(prompts, done, strict=True):
        expected = continuation(prompt, 60)
        assert completion.prompt_tokens == prompt
        assert completion.tokens == expected
        assert completion.text == text_of(expected)
        assert completion.finish_reason == ("stop" if expected[-1] == EOS else "length")
        assert completion.num_preemptions == 0
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_a_cache_of_its_own_is_large_enough(model, draw_prompts):
    prompts = draw_prompts(9, 1, 90, seed=3)
    done = generate(
        model, prompts, max_tokens=40, max_batch=3, block_size=16, k_format="fp32", v_format="fp32"
    )
    assert [c.tokens for c in done] == [continuation(p, 40) for p in prompts]
    assert all(c.num_preemptions == 0 for c in done)


@pytest.mark.parametrize("num_blocks", [9, 12, 20])
@pytest.mark.parametrize("prefill_budget", [1, 7, 512])
def test_preemption_changes_no_text(num_blocks, prefill_budget, model, make_cache, draw_prompts):
    # Each text takes up to 9 blocks of 16; 12 of them want to run at once.
    prompts = draw_prompts(12, 1, 80, seed=num_blocks)
    cache = make_cache(num_blocks)
    with Generator(model, cache, max_batch=12, prefill_budget=prefill_budget) as generator:
        for prompt in prompts:
            generator.add(prompt, max_tokens=64, ignore_eos=True)
        done = {}
        while generator:
            for event in generator.step():
                if event.completion:
                    done[event.index] = event.completion
            cache.check()
    for index, prompt in enumerate(prompts):
        assert done[index].tokens == continuation(prompt, 64, eos=None)
    total = sum(c.num_preemptions for c in done.values())
    assert total == generator.metrics.preemptions
    if prefill_budget > 1:  # otherwise prompts are read so slowly that few texts overlap
        assert total > 0


def test_the_oldest_request_is_never_preempted(model, make_cache, draw_prompts):
    done = generate(
        model, draw_prompts(8, 30, 40), max_tokens=90, ignore_eos=True, cache=make_cache(9)
    )
    assert done[0].num_preemptions == 0
    assert max(c.num_preemptions for c in done) > 0


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_prompt_tokens_stay_within_the_budget(budget, model, make_cache, draw_prompts):
    prompts = draw_prompts(6, 2, 100, seed=budget)
    generate(
        model,
        prompts,
        max_tokens=8,
        ignore_eos=True,
        cache=make_cache(64),
        prefill_budget=budget,
        max_batch=6,
    )
    mixed = 0
    for lengths, _ in model.decoder.steps:
        chunks = [n for n in lengths if n > 1]
        assert sum(chunks) <= budget
        mixed += bool(chunks) and 1 in lengths
    assert budget == 1 or mixed > 0, "no step had decodes beside a prompt chunk"
    prompt_tokens = sum(map(len, prompts))
    assert sum(sum(n) for n, _ in model.decoder.steps) == prompt_tokens + 6 * 7


def test_logits_are_asked_for_only_where_a_prompt_ends(model, make_cache):
    generate(model, [[5] * 40], max_tokens=2, cache=make_cache(8), prefill_budget=16)
    assert model.decoder.steps == [([16], "none"), ([16], "none"), ([8], "last"), ([1], "last")]


def test_no_more_than_max_batch_run_at_once(model, make_cache, draw_prompts):
    generate(model, draw_prompts(9, 1, 20), max_tokens=9, cache=make_cache(99), max_batch=4)
    assert max(len(lengths) for lengths, _ in model.decoder.steps) == 4


def test_requests_join_between_steps(model, make_cache, draw_prompts):
    first, second = draw_prompts(2, 5, 9)
    with Generator(model, make_cache(16)) as generator:
        generator.add(first, max_tokens=20, ignore_eos=True)
        events = [generator.step() for _ in range(5)]
        generator.add(second, max_tokens=20, ignore_eos=True)
        while generator:
            events.append(generator.step())
    tokens = {0: [], 1: []}
    for event in (event for step in events for event in step):
        tokens[event.index].append(event.token)
    assert tokens == {
        0: continuation(first, 20, eos=None),
        1: continuation(second, 20, eos=None),
    }
    assert len(events) == 25


def test_a_cached_prefix_is_not_computed_again(model, make_cache):
    cache = make_cache(32)
    shared = [7, 8, 9] * 20
    one = generate(model, [[*shared, 1]], max_tokens=10, cache=cache)[0]
    model.decoder.steps.clear()
    two = generate(model, [[*shared, 2]], max_tokens=10, cache=cache)[0]
    assert (one.num_cached, two.num_cached) == (0, 48)  # three full blocks of 16
    assert model.decoder.steps[0] == ([13], "last")
    assert two.tokens == continuation([*shared, 2], 10)


def test_salts_keep_prefixes_apart(model, make_cache):
    cache = make_cache(32)
    cached = []
    for salt in ("a", "b", "a"):
        with Generator(model, cache) as generator:
            generator.add([5] * 40, max_tokens=1, salt=salt)
            cached += [event.completion.num_cached for event in generator.step()]
    assert cached == [0, 0, 32]


def test_streaming_gives_what_generate_gives(model, make_cache, draw_prompts):
    prompts = draw_prompts(7, 1, 60, seed=9)
    params = [SamplingParams(temperature=9.0, seed=i) for i in range(7)]
    options = {"max_tokens": 30, "stop": ["55", "Z", 17], "sampling": params, "max_batch": 3}
    done = generate(model, prompts, cache=make_cache(40), **options)
    texts, tokens, finished = [""] * 7, [[] for _ in prompts], {}
    for event in stream(model, prompts, cache=make_cache(40), **options):
        assert event.index not in finished
        texts[event.index] += event.text
        tokens[event.index].append(event.token)
        if event.finish_reason:
            finished[event.index] = event.completion
    assert [finished[i] for i in range(7)] == done
    assert texts == [c.text for c in done]
    assert tokens == [c.tokens for c in done]
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(model, make_cache, draw_prompts):
    prompts = draw_prompts(6, 1, 50, seed=4)
    params = [SamplingParams(temperature=6.0, top_p=0.9, seed=i) for i in range(6)]
    options = {"max_tokens": 40, "ignore_eos": True}
    together = generate(model, prompts, sampling=params, cache=make_cache(10), **options)
    assert sum(c.num_preemptions for c in together) > 0
    for prompt, param, expected in zip(prompts, params, together, strict=True):
        alone = generate(model, [prompt], sampling=param, cache=make_cache(10), **options)[0]
        assert alone.tokens == expected.tokens
    assert together[0].tokens != continuation(prompts[0], 40, eos=None)


def test_stop_strings_may_span_tokens(model, make_cache):
    prompt = [11, 12, 13]
    tokens = continuation(prompt, 30, eos=None)
    text = text_of(tokens)
    stop = text[9:12]
    done = generate(
        model, [prompt], max_tokens=30, stop=[stop, "#"], ignore_eos=True, cache=make_cache(4)
    )[0]
    end = text.index(stop)
    assert done.text == text[:end]
    assert done.tokens == tokens[: end + 3]
    assert done.finish_reason == "stop"


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(model, make_cache):
    tokens = continuation([1, 2], 10, eos=None)
    done = generate(
        model, [[1, 2]], max_tokens=10, stop=tokens[4], ignore_eos=True, cache=make_cache(4)
    )[0]
    first = tokens.index(tokens[4])
    assert done.tokens == tokens[: first + 1]
    assert done.text == text_of(tokens[:first])


def test_text_held_back_for_a_stop_string_comes_at_the_end(model, make_cache):
    text = text_of(continuation([1, 2], 6, eos=None))
    done = generate(
        model, [[1, 2]], max_tokens=6, stop=text[-2:] + "!", ignore_eos=True, cache=make_cache(4)
    )[0]
    assert (done.text, done.finish_reason) == (text, "length")


def test_the_context_ends_a_text(make_cache, draw_prompts):
    small = CountingModel(max_context=50)
    (prompt,) = draw_prompts(1, 40, 41)
    done = generate(small, [prompt], max_tokens=None, ignore_eos=True, cache=make_cache(4))[0]
    assert done.tokens == continuation(prompt, 10, eos=None)
    assert done.finish_reason == "length"


def test_prompts_may_be_text_ids_or_chat(model, make_cache):
    same = ["579", [5, 7, 9], [{"role": "user", "content": "579"}]]
    done = generate(model, same, max_tokens=5, cache=make_cache(8))
    assert {tuple(c.tokens) for c in done} == {tuple(continuation([5, 7, 9], 5))}


def test_no_prompts_give_no_texts(model):
    assert generate(model, []) == []


def test_metrics_tell_prefill_from_decode(model, make_cache):
    with Generator(model, make_cache(8), prefill_budget=16) as generator:
        generator.add([3] * 40, max_tokens=5, ignore_eos=True)
        while generator:
            generator.step()
    metrics = generator.metrics
    assert (metrics.prefill.tokens, metrics.decode.tokens, metrics.steps) == (40, 4, 7)
    assert metrics.prefill.tokens_per_second > 0 < metrics.decode.tokens_per_second


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], InvalidArgument, "at least one token"),
        ("", InvalidArgument, "empty string"),
        ([1, VOCAB], InvalidArgument, f"got {VOCAB}"),
        ([-1], InvalidArgument, "got -1"),
        ([1.5], InvalidType, "token ids"),
        ([True], InvalidType, "token ids"),
        (None, InvalidType, "NoneType"),
        (7, InvalidType, "int"),
        ([1] * 1000, InvalidArgument, "context of 1000, got 1000"),
        ([1] * 65, InvalidArgument, "at most 64 tokens"),
    ],
)
def test_bad_prompts_change_nothing(prompt, error, message, model, make_cache):
    cache = make_cache(4)
    with Generator(model, cache) as generator:
        with pytest.raises(error, match=rf"^prompt: expected .*{message}"):
            generator.add(prompt)
        assert not generator
    with pytest.raises(error, match="prompt"):
        generate(model, [[1], prompt], max_tokens=1, cache=cache)
    assert cache.stats().allocations == 0
    assert model.decoder.steps == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 0}, InvalidArgument),
        ({"max_tokens": 1.5}, InvalidType),
        ({"max_batch": 0}, InvalidArgument),
        ({"prefill_budget": 0}, InvalidArgument),
        ({"stop": [""]}, InvalidArgument),
        ({"stop": VOCAB}, InvalidArgument),
        ({"sampling": [SamplingParams()] * 3}, InvalidArgument),
    ],
)
def test_bad_options_are_named(options, error, model):
    with pytest.raises(error, match=rf"^{next(iter(options))}: expected .* got "):
        stream(model, [[1], [2]], **options)
    assert model.decoder.steps == []


@pytest.mark.parametrize("prompts", ["123", b"123", None, 7, iter([[1]])])
def test_what_is_no_list_of_prompts_is_refused(prompts, model):
    with pytest.raises(InvalidType, match=r"^prompts: expected a list .* got"):
        generate(model, prompts)


@pytest.mark.parametrize("sampling", [{"temperature": 1}, [0.5, 0.5]])
def test_sampling_must_be_sampling_params(sampling, model):
    with pytest.raises(InvalidType, match=r"^sampling: expected SamplingParams"):
        generate(model, [[1], [2]], sampling=sampling)


def test_a_text_that_can_never_fit_is_refused_when_it_comes(model, make_cache):
    with Generator(model, make_cache(4)) as generator:
        generator.add([1] * 10, max_tokens=55)
        with pytest.raises(OutOfBlocks) as caught:
            generator.add([1] * 10, max_tokens=56)
        assert (caught.value.needed, caught.value.available) == (5, 4)


def test_a_cache_that_others_fill_raises_and_leaves_theirs_alone(model, make_cache):
    cache = make_cache(4)
    other = cache.sequence()
    model.decoder.steps.clear()
    with cache.step([(other, 50)]) as step:
        model.decoder.forward(step, [1] * 50)
    with Generator(model, cache) as generator:
        generator.add([2, 3], max_tokens=40, ignore_eos=True)
        with pytest.raises(OutOfBlocks):
            while generator:
                generator.step()
        assert cache.stats().in_use == 4 and len(other) == 50
        other.free()
        tokens = [event.token for _ in range(40) if generator for event in generator.step()]
    assert tokens == continuation([2, 3], 40, eos=None)[-len(tokens) :]


def test_cancel_frees_a_request_wherever_it_is(model, make_cache, draw_prompts):
    cache = make_cache(16)
    with Generator(model, cache, max_batch=2) as generator:
        for prompt in draw_prompts(3, 5, 10):
            generator.add(prompt, max_tokens=9, ignore_eos=True)
        generator.step()
        generator.cancel(0)
        generator.cancel(2)
        assert cache.stats().num_sequences == 1
        indices = {event.index for _ in range(8) for event in generator.step()}
        assert indices == {1} and not generator
        with pytest.raises(InvalidArgument, match="index"):
            generator.cancel(1)


def test_a_cache_of_another_shape_is_refused(model):
    import kvcore

    spec = kvcore.CacheSpec(num_layers=3, num_kv_heads=1, head_dim=16, block_size=16)
    with pytest.raises(InvalidArgument, match="cache: expected 2 layers"):
        Generator(model, kvcore.KVCache(spec, num_blocks=2))
