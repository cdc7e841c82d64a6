"""Render docs/gpu.md: what was measured on a GPU, and what is known without one."""

from pathlib import Path
from typing import Any

from gpu.records import ENDED, FAILED, SKIPPED, read_lines

TEMPLATE = Path(__file__).parent / "page.md"
NEEDS = {"tests": "pytest, datasets, evaluate", "lamb": "pytorch_optimizer", "study": "datasets, evaluate"}


def render(results: Path) -> str:
    from gpu.stages import STAGES  # imports the models

    lines = [line for line in read_lines(results) if not line.get("tiny")]
    rows = [f"| `{name}` | {stage.question} | {NEEDS.get(name.split('-')[0], '')} |" for name, stage in STAGES.items()]
    state = "Nothing has been measured on a GPU yet, because none was available."
    if lines:
        state = "\n\n".join(_table(device, lines) for device in dict.fromkeys(line["device"] for line in lines))
    return TEMPLATE.read_text(encoding="utf-8").format(state=state, stages="\n".join(rows))


def _table(device: str, lines: list[dict[str, Any]]) -> str:
    """The newest line of each figure."""
    newest = {
        (line["stage"], line["value"] if line["figure"] == SKIPPED else line["figure"]): line
        for line in lines
        if line["device"] == device and line["figure"] != ENDED
    }
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in newest.values())
    rows = [f"## {device}\n\n{'; '.join(versions)}\n", "| stage | figure | value | spread | goal | revision |"]
    rows.append("|---|---|---|---|---|---|")
    for (stage, _), line in newest.items():
        figure = line["figure"]
        label = f"**{figure}**" if figure in (FAILED, SKIPPED) else figure
        cells = [stage, label, f"{_cell(line['value'])} {line['unit']}".strip(), _cell(line["spread"]), line["goal"]]
        rows.append(f"| {' | '.join(cells)} | {line['revision']} |")
    return "\n".join(rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(_cell, value)) if all(not isinstance(v, str) for v in value) else "; ".join(value)
    return f"{value:,}" if isinstance(value, int | float) else str(value).replace("|", "/")
