"""`kvcore generate` with a small random model in place of a loaded one."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner

from kvcore.cli.app import app
from kvcore.models import generate as library_generate
from kvcore.models.sampling import SamplingParams


@pytest.fixture
def run(tiny_model, monkeypatch):
    monkeypatch.setattr("kvcore.cli.generate.load", lambda *_args, **_options: tiny_model)

    def invoke(*arguments, **options):
        result = CliRunner().invoke(app, ["generate", *arguments], **options)
        assert result.exit_code == 0, result.output
        return result

    return invoke


def test_one_prompt_streams_its_text_and_nothing_else(run, tiny_model):
    result = run("hello", "--max-tokens", "9")
    assert result.stdout == library_generate(tiny_model, ["hello"], max_tokens=9)[0].text + "\n"
    assert result.stderr == ""


def test_several_prompts_come_in_their_order(run, tiny_model):
    prompts = [f"prompt {i}" * (9 - i) for i in range(8)]
    result = run(*prompts, "--max-tokens", "5", "--max-batch", "3")
    done = library_generate(tiny_model, prompts, max_tokens=5)
    expected = "".join(f"[{i + 1}] {p}\n{done[i].text}\n" for i, p in enumerate(prompts))
    assert result.stdout == expected


def test_json_has_a_line_a_prompt_and_one_of_stats(run, tiny_model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    options = ["--temperature", "2", "--seed", "4", "--max-tokens", "6", "--block-size", "16"]
    result = run("--file", str(file), *options, "--json", "--stats", "--num-blocks", "7")
    *lines, last = map(json.loads, result.stdout.splitlines())
    sampling = SamplingParams(temperature=2, seed=4)
    done = library_generate(tiny_model, ["one", "two"], max_tokens=6, sampling=sampling)
    assert [line["tokens"] for line in lines] == [c.tokens for c in done]
    assert [line["text"] for line in lines] == [c.text for c in done]
    assert [line["index"] for line in lines] == [0, 1]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    assert {line["finish_reason"] for line in lines} <= {"stop", "length"}
    stats = last["stats"]
    assert stats["prefill_tokens"] == sum(len(c.prompt_tokens) for c in done)
    assert stats["blocks_total"] == 7 == stats["blocks_cached"] + stats["blocks_free"]
    assert stats["blocks_peak"] == 2 and stats["blocks_in_use"] == 0


def test_stdin_and_chat_and_stats(run, tiny_model):
    result = run("-", "--chat", "--system", "hush", "--max-tokens", "4", "--stats", input="hi\n")
    messages = [{"role": "system", "content": "hush"}, {"role": "user", "content": "hi"}]
    expected = library_generate(tiny_model, [messages], max_tokens=4)[0].text
    assert result.stdout == expected + "\n"
    assert "tokens/s" in result.stderr and "blocks" in result.stderr


def test_memory_sets_the_size_of_the_cache(run):
    result = run("x", "--max-tokens", "2", "--memory", "1MiB", "--json", "--stats")
    assert 0.9 * 2**20 < json.loads(result.stdout.splitlines()[-1])["stats"]["bytes"] <= 2**20


def test_a_prompt_that_does_not_fit_is_one_line(tiny_model, monkeypatch):
    monkeypatch.setattr("kvcore.cli.generate.load", lambda *_args, **_options: tiny_model)
    result = CliRunner().invoke(app, ["generate", "x" * 5000])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: prompt: expected fewer tokens than the model's context")
    result = CliRunner().invoke(app, ["generate", "x", "--num-blocks", "1", "--max-tokens", "99"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: group 0: 2 blocks needed, 1 available")


def test_a_reader_that_leaves_is_no_error(run, monkeypatch):
    class ClosedPipe(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    monkeypatch.setattr("sys.stderr", errors := io.StringIO())
    with pytest.raises(SystemExit) as caught:
        app.main(["generate", "hello", "--max-tokens", "9"])
    assert caught.value.code == 1
    assert errors.getvalue() == ""
