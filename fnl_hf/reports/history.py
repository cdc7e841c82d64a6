"""What a Trainer's log history holds: series over the steps, and the diagnostics of products with their means."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fnl_hf.reports.callbacks import NORM_PREFIX

LogHistory = list[dict[str, Any]]
# kind of product -> how it is written, in mathematics and in Markdown
KINDS = {
    "qk": ("$QK^T$", "QKᵀ"),
    "vo": ("$VO^T$", "VOᵀ"),
    "rotary": ("$QRK^T$", "QRKᵀ"),
    "linear": ("$UV^T$", "UVᵀ"),
    "uv": ("$UV^T$", "UVᵀ"),
    "deep": ("$UMV^T$", "UMVᵀ"),
}
NORMS = ("frobenius", "nuclear", "bound")
LAYER_RANGES = 3  # rows of a kind in the table of norms, at most


def series(log_history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    entries = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [step for step, _ in entries], [value for _, value in entries]


def logged_products(log_history: LogHistory) -> dict[str, list[str]]:
    """Names of the products whose diagnostics were logged, in the model's order, by kind."""
    found: dict[str, dict[str, None]] = {}
    for key in dict.fromkeys(key for entry in log_history for key in entry if key.startswith(NORM_PREFIX)):
        kind, name = key.removeprefix(NORM_PREFIX).split("/")[:2]
        found.setdefault(kind, {})[name] = None
    return {kind: list(names) for kind, names in found.items()}


def mean_diagnostic(log_history: LogHistory, kind: str, names: Sequence[str], diagnostic: str) -> LogHistory:
    """A history of one quantity, named as the diagnostic: its mean over products of one kind."""
    keys = [f"{NORM_PREFIX}{kind}/{name}/{diagnostic}" for name in names]
    means = []
    for entry in log_history:
        if values := [entry[key] for key in keys if key in entry]:
            means.append({"step": entry["step"], diagnostic: fmean(values)})
    return means


def norms_table(log_history: LogHistory) -> str:
    """The products' norms when they were last logged, as Markdown: means by kind and range of layers; "" if none
    were."""
    rows, step = [], 0
    for kind, names in logged_products(log_history).items():
        for layers, members in _layer_ranges(names).items():
            means = [mean_diagnostic(log_history, kind, members, norm) for norm in NORMS]
            step = max(step, means[0][-1]["step"])
            figures = [f"{mean[-1][norm]:.3g}" for norm, mean in zip(NORMS, means)]
            rows.append([KINDS[kind][1] if kind in KINDS else kind, layers, str(len(members)), *figures])
    if not rows:
        return ""
    header = ["product", "layers", "count", "Frobenius norm", "nuclear norm", "its bound"]
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Norms of the products at step {step:,}; each row is a mean:\n\n{table}"


def _layer_ranges(names: Sequence[str]) -> dict[str, list[str]]:
    """Products by the range of layers that they are in, as "0 to 3"; those whose name does not tell are the rest."""
    numbers = {name: _layer(name) for name in names}
    layers = sorted({number for number in numbers.values() if number is not None})
    width = max(1, -(-len(layers) // LAYER_RANGES))
    ranges: dict[str, list[str]] = {}
    for start in range(0, len(layers), width):
        first, last = layers[start], layers[start : start + width][-1]
        title = f"{first}" if first == last else f"{first} to {last}"
        ranges[title] = [name for name, number in numbers.items() if number is not None and first <= number <= last]
    rest = [name for name, number in numbers.items() if number is None]
    return ranges | ({"other" if ranges else "all": rest} if rest else {})


def _layer(name: str) -> int | None:
    """The only number in a product's name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None
