"""``make docs-results``: write docs/results/README.md anew from the figures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import RESULTS


def tables() -> str:
    """All full results as Markdown; a mapping of rows becomes a table, everything else a list of figures."""
    parts = [
        "# Results",
        "",
        "Made by `make docs-results` from the JSON files beside this page; don't edit it.",
        "Each file says date, commit, hardware and command.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["quick"]:
            continue
        hardware = document["hardware"]
        parts += [
            "",
            f"## {document['name']}",
            "",
            f"{document['date'][:10]}, commit `{document['commit']}`, "
            f"{hardware['cores']} cores of {hardware['processor']}; `{document['command']}`",
            "",
            *_plot(path.with_suffix(".png").name, document["name"]),
            *_rows(document["figures"]),
        ]
    return "\n".join(parts) + "\n"


def _plot(name: str, title: str) -> Iterator[str]:
    if (RESULTS / name).exists():
        yield f"![{title}]({name})"
        yield ""


def _rows(figures: Mapping[str, Any]) -> Iterator[str]:
    scalars = {key: value for key, value in figures.items() if not isinstance(value, dict | list)}
    if scalars:
        yield "| figure | value |"
        yield "|---|---|"
        yield from (f"| {key} | {_text(value)} |" for key, value in scalars.items())
    for key, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            value = [{key: name, **row} for name, row in value.items()]
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            columns = list(dict.fromkeys(column for row in value for column in row))
            yield ""
            yield f"**{key}**"
            yield ""
            yield "| " + " | ".join(columns) + " |"
            yield "|" + "---|" * len(columns)
            yield from ("| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in value)
        elif isinstance(value, list):
            yield ""
            yield f"**{key}**: {', '.join(_text(entry) for entry in value)}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return str(value)


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(tables(), encoding="utf-8")
