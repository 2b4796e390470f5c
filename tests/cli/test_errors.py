"""What the terminal sees of errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvcore.cli.app import app


def run(*arguments, **options):
    return CliRunner().invoke(app, arguments, **options)


def one_error_line(result):
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr[len("error: ") : -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "prompt: expected"),
        (["generate", "x", "--model", "smollm3"], "smollm2"),
        (["generate", "x", "--temperature", "-1"], "temperature: expected"),
        (["generate", "x", "--top-p", "2"], "top_p: expected"),
        (["generate", "x", "--threads", "1000"], "--threads"),
        (["generate", "x", "--file", "/nowhere"], "No such file"),
        (["generate", "x", "--memory", "1GiB", "--num-blocks", "3"], "--memory and --num-blocks"),
        (["generate", "x", "--system", "be kind"], "--chat"),
        (["generate", "x", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["paint"], "paint"),
    ],
)
def test_what_the_caller_can_mend_is_one_line_and_exit_2(arguments, message):
    result = run(*arguments)
    assert message in one_error_line(result)
    assert result.exit_code == 2


def test_a_bug_is_one_line_and_exit_1(monkeypatch):
    def crash(*_args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("kvcore.cli.info.gather", crash)
    result = run("info")
    assert one_error_line(result).startswith("internal: ZeroDivisionError: oops")
    assert result.exit_code == 1
    result = run("--debug", "info")
    assert isinstance(result.exception, ZeroDivisionError)


def test_debug_shows_the_exception():
    result = run("--debug", "generate", "x", "--temperature", "-1")
    assert type(result.exception).__name__ == "InvalidArgument"


def test_ctrl_c_is_one_line_and_exit_130(monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcore.cli.info.gather", interrupt)
    result = run("info")
    assert result.stderr.strip() == "error: interrupted"
    assert result.exit_code == 130


def test_help_and_version():
    import kvcore

    for arguments in (["--help"], ["generate", "-h"], ["info", "-h"], ["demo", "-h"]):
        result = run(*arguments)
        assert result.exit_code == 0 and result.stdout.startswith("Usage:")
    assert run("--version").stdout == f"kvcore, version {kvcore.__version__}\n"
    assert run().exit_code == 2


def test_without_click_a_sentence_says_how_to_install_it():
    code = "import sys; sys.modules['click'] = None; import kvcore.cli; kvcore.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == ('error: the command line needs click; run: pip install "kvcore[cli]"\n')


def test_info_needs_none_of_the_packages_that_models_need():
    blocked = ["gguf", "jinja2", "safetensors", "tokenizers", "tqdm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = ['kvcore', 'info'];"
        "import kvcore.cli; kvcore.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_package_of_models_is_one_line():
    code = (
        "import sys; sys.modules['gguf'] = None; sys.argv = ['kvcore', 'generate', 'x'];"
        "import kvcore.cli; kvcore.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install" in done.stderr


def test_a_closed_pipe_is_quiet():
    command = f'"{sys.executable}" -m kvcore info --json | head -c 1'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{", "")
