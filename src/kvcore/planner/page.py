"""A plan as one HTML page that needs nothing else."""

from __future__ import annotations

import importlib
from importlib.resources import files
from typing import Any

from kvcore.errors import MissingExtra
from kvcore.planner import plot, report
from kvcore.planner.answers import Plan


def render(plan: Plan) -> str:
    """The page: the same tables and pictures, styles and pictures within, no script, no network.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    source = files("kvcore.planner").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = _jinja2().Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page: str = environment.from_string(source).render(
        title=f"{plan.model.name} on {plan.device.name}",
        plan=plan,
        tables=[
            {
                "title": section.title,
                "columns": section.columns,
                "rows": report.shown_rows(section),
                "note": section.note,
            }
            for section in report.sections(plan)
        ],
        pictures=[{"title": title, "svg": plot.svg(plan, title)} for title in plot.PANELS],
    )
    return page


def _jinja2() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError:
        raise MissingExtra(
            'html: expected jinja2 to be installed; run: pip install "kvcore[plan]"'
        ) from None
