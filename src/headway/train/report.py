"""The page of a run: `report.html`, written from what a run directory holds so far.

`write_report(run_dir)` reads `config.toml`, `environment.json`, `metrics.jsonl` and `samples.jsonl`, each of which
may be missing, and writes one HTML file that needs nothing else: no network, no other file, and JavaScript only for
the read-out under the pointer. It may be called at any time, also beside a run that goes on or was killed.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headway.plots import Panel, Style, downsample, short_number, svg, theme

__all__ = ["write_report"]

SAMPLES_SHOWN = 40
EVENTS_SHOWN = 200
MARKS_DRAWN = 60


def write_report(run_dir: str | Path) -> Path:
    r"""Write `report.html` into a run directory and return its path.

    The file is replaced in one move, so a reader never meets half a page. In `metrics.jsonl` a record whose step is
    not above the one before it (a run resumed from an earlier checkpoint) takes the place of the records from its
    step on. An unfinished last line, as a killed process leaves, is ignored; other unreadable lines are left out and
    counted on the page.

    Args:
        run_dir: folder with any of `config.toml`, `environment.json` (one flat object), `metrics.jsonl` (training
            records `step, loss, lr, grad_norm, tokens, tokens_per_second, seconds, memory_mb`, where tokens and
            seconds count from the start of the run; evaluation records `step, validation_loss`; event records
            `step, event, text`) and `samples.jsonl` (`step, prompt, text`).

    Raises:
        NotADirectoryError: if `run_dir` is no folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss": 8.3}\n{"step": 2, "lo')
    ...     write_report(folder).name
    'report.html'

    """
    from jinja2 import Environment, StrictUndefined

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise NotADirectoryError(f"run_dir must be a folder, got {str(run_dir)!r}")
    run = _read(run_dir)
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        name=run_dir.resolve().name,
        theme=theme(),
        facts=_facts(run),
        lead=_lead(run),
        loss=_loss_drawings(run),
        plots=_plots(run),
        events=run.events[-EVENTS_SHOWN:],
        events_left_out=max(0, len(run.events) - EVENTS_SHOWN),
        samples=_by_step(run.samples[-SAMPLES_SHOWN:]),
        samples_left_out=max(0, len(run.samples) - SAMPLES_SHOWN),
        config=[_toml_parts(line) for line in run.config.splitlines()],
        environment=[(key.replace("_", " "), _plain(value)) for key, value in run.environment.items()],
        notes=run.notes,
    )
    return _replace(run_dir / "report.html", page)


@dataclass
class _Run:
    """What a run directory tells."""

    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    notes: list[str] = field(default_factory=list)

    def column(self, key: str) -> np.ndarray:
        """One number per training record, NaN where a record lacks it."""
        return np.array([_number(record.get(key)) for record in self.train], dtype=float)


def _read(run_dir: Path) -> _Run:
    run = _Run()
    config = run_dir / "config.toml"
    if config.exists():
        run.config = config.read_text(encoding="utf-8", errors="replace")
    environment = run_dir / "environment.json"
    if environment.exists():
        try:
            run.environment = dict(json.loads(environment.read_text(encoding="utf-8", errors="replace")))
        except (ValueError, TypeError):
            run.notes.append("environment.json could not be read.")
    for record in _records(run_dir / "metrics.jsonl", run.notes):
        if not math.isfinite(_number(record.get("step"))):
            continue
        if "event" in record:
            run.events.append(_event(record))
        elif "validation_loss" in record:
            _append(run.validation, record)
        else:
            _append(run.train, record)
    run.samples = [
        {"step": record.get("step"), "prompt": str(record.get("prompt", "")), "text": str(record.get("text", ""))}
        for record in _records(run_dir / "samples.jsonl", run.notes)
    ]
    return run


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    lost = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        elif number < len(lines) - 1:
            lost += 1
    if lost:
        notes.append(f"{lost} unreadable {'line' if lost == 1 else 'lines'} of {path.name} left out.")


def _append(records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    while records and records[-1]["step"] >= record["step"]:
        records.pop()
    records.append(record)


def _event(record: dict[str, Any]) -> dict[str, Any]:
    kind = str(record["event"]).replace("_", " ")
    trouble = re.search(
        r"corrupt|passed over|fail|error|non-?finite|skip|lost|killed|interrupt",
        f"{kind} {record.get('text', '')}",
        re.I,
    )
    return {"step": record["step"], "kind": kind, "text": str(record.get("text", "")), "trouble": bool(trouble)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _finite(values: Iterable[float]) -> np.ndarray:
    numbers = np.asarray(list(values), dtype=float)
    return numbers[np.isfinite(numbers)]


def _lead(run: _Run) -> str:
    """The line under the run's name."""
    parts = [_plain(run.environment[key]) for key in ("device", "precision") if key in run.environment]
    if "headway" in run.environment:
        parts.append(f"headway {_plain(run.environment['headway'])}")
    return " · ".join(parts)


def _facts(run: _Run) -> list[dict[str, Any]]:
    """The figures at the top: name, value and a remark each."""
    facts: list[dict[str, Any]] = []
    loss = run.column("loss")
    if len(loss):
        recent = _finite(loss[-_window(len(loss)) :])
        final = float(recent.mean()) if len(recent) else math.nan
        facts.append(
            _fact("training loss", _loss(final), f"mean of the last {len(recent)} steps" if len(recent) > 1 else "")
        )
    if run.validation:
        last = _number(run.validation[-1]["validation_loss"])
        remark = f"perplexity {_perplexity(last)}, step {_step(run.validation[-1]['step'])}"
        facts.append(_fact("validation loss", _loss(last), remark))
        losses = _finite(_number(record["validation_loss"]) for record in run.validation)
        if len(losses) and losses.min() < last:
            facts[-1]["remark"] += f"; best {_loss(float(losses.min()))}"
    if not run.train:
        return facts
    facts.append(_fact("steps", _step(run.train[-1]["step"])))
    tokens = _finite(run.column("tokens"))
    if len(tokens):
        facts.append(_fact("tokens", _count(float(tokens[-1]))))
    seconds = _finite(run.column("seconds"))
    if len(seconds):
        facts.append(_fact("wall time", _duration(float(seconds[-1]))))
    speed = _finite(run.column("tokens_per_second"))
    if len(speed):
        facts.append(_fact("tokens/s", short_number(_rounded(float(np.median(speed)))), "median"))
    memory = _finite(run.column("memory_mb"))
    if len(memory):
        facts.append(_fact("peak memory", _megabytes(float(memory.max()))))
    if "parameters" in run.environment:
        facts.append(_fact("parameters", _plain(run.environment["parameters"], short=True)))
    return facts


def _fact(name: str, value: str, remark: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "remark": remark, "large": name.endswith("loss")}


def _window(steps: int) -> int:
    """Records that a running mean spans: one in thirty."""
    return max(1, steps // 30)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean of the finite values.

    The window shrinks towards the first record, where a loss falls steeply, and is cut off at the last.
    """
    count = len(values)
    index = np.arange(count)
    before = np.minimum(index, _window(count) // 2 + 1)
    start, stop = index - before, np.minimum(index + before, count - 1) + 1
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    members = counts[stop] - counts[start]
    return np.where(members > 0, (totals[stop] - totals[start]) / np.maximum(members, 1), np.nan)


def _loss_drawings(run: _Run) -> dict[str, str]:
    """The loss drawn for a wide and for a narrow page, and a remark; empty if there is no loss to draw."""
    steps, loss = run.column("step"), run.column("loss")
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    styles: dict[str, Style] = {}
    if len(loss) >= 30:
        curves["every step"], styles["every step"] = downsample(steps, loss), "faint"
        curves["training"] = downsample(steps, _smooth(loss))
    elif len(loss):
        curves["training"] = downsample(steps, loss)
    if run.validation:
        points = downsample(
            [record["step"] for record in run.validation],
            [_number(record["validation_loss"]) for record in run.validation],
        )
        curves["validation"], styles["validation"] = points, "points" if len(points[0]) <= 60 else "line"
    shown = _finite(value for _, values in curves.values() for value in values)
    if not len(shown):
        return {}
    panel = Panel("", "step", "loss (nats per token)", curves, styles=styles, log_y=_spread(shown), marks=_marks(run))
    label = f"Loss over steps, from {_loss(float(shown[0]))} to {_loss(float(shown[-1]))}"
    return {
        "wide": svg([panel], "loss-wide", width=9.4, height=3.7, label=label),
        "narrow": svg([panel], "loss-narrow", width=4.6, height=3.4, label=label),
        "remark": "dotted lines: events, listed below" if panel.marks else "",
    }


def _plots(run: _Run) -> list[dict[str, str]]:
    """Plots of the other quantities: heading, remark and drawing each."""
    steps = run.column("step")
    plots = []
    for key, title, unit, from_zero in (
        ("lr", "Learning rate", "", True),
        ("grad_norm", "Gradient norm", "", False),
        ("tokens_per_second", "Throughput", "tokens per second", True),
        ("memory_mb", "Memory", "MB", True),
    ):
        values = run.column(key)
        shown = _finite(values)
        if not len(shown):
            continue
        noisy = key in ("grad_norm", "tokens_per_second") and len(values) >= 30
        curves = {"every step": downsample(steps, values, limit=1000)}
        if noisy:
            curves["smoothed"] = downsample(steps, _smooth(values), limit=1000)
        panel = Panel(
            "",
            "step",
            unit,
            curves if noisy else {"": curves["every step"]},
            styles={"every step": "faint"} if noisy else {},
            from_zero=from_zero,
            log_y=key == "grad_norm" and _spread(shown),
        )
        remark = {
            "lr": f"peak {short_number(_rounded(float(shown.max())))}",
            "grad_norm": f"median {short_number(_rounded(float(np.median(shown))))}",
            "tokens_per_second": f"median {short_number(_rounded(float(np.median(shown))))} tokens/s",
            "memory_mb": f"peak {_megabytes(float(shown.max()))}",
        }[key]
        drawing = svg([panel], key.replace("_", "-"), width=4.6, height=2.7, label=f"{title} over steps, {remark}")
        plots.append({"title": title, "remark": remark, "drawing": drawing})
    return plots


def _spread(values: np.ndarray) -> bool:
    """Whether one scale cannot show the middle and the extremes, so that a logarithmic axis is needed."""
    return bool(values.min() > 0 and values.max() > 30 * np.median(values))


def _marks(run: _Run) -> list[float]:
    steps = sorted({_number(event["step"]) for event in run.events})
    return steps if len(steps) <= MARKS_DRAWN else []


def _by_step(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples grouped by their step, the latest first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(_step(sample["step"]), []).append(sample)
    return [{"step": step, "samples": groups[step]} for step in reversed(groups)]


def _toml_parts(line: str) -> list[tuple[str, str]]:
    """A line of TOML as (kind, text), kinds: section, key, value, comment, plain."""
    if re.match(r"\s*\[", line):
        return [("section", line)]
    if re.match(r"\s*#", line):
        return [("comment", line)]
    if match := re.match(r"(\s*[A-Za-z0-9_.\"'-]+)(\s*=\s*)(.*)", line):
        return [("key", match[1]), ("plain", match[2]), ("value", match[3])]
    return [("plain", line)]


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _perplexity(loss: float) -> str:
    if not loss < 700:
        return "not finite"
    return f"{math.exp(loss):.1f}" if loss < 7 else short_number(_rounded(math.exp(loss)))


def _step(value: Any) -> str:
    number = _number(value)
    return f"{number:,.0f}".replace(",", " ") if math.isfinite(number) else str(value)


def _count(value: float) -> str:
    """Exact where that is short."""
    return _step(value) if value < 100_000 else short_number(_rounded(value))


def _rounded(value: float) -> float:
    """To three significant digits."""
    return float(f"{value:.3g}")


def _plain(value: Any, short: bool = False) -> str:
    number = _number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(number):
        return str(value)
    if short:
        return _count(number)
    return _step(number) if number == int(number) else f"{number:g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _megabytes(value: float) -> str:
    return f"{value:.0f} MB" if value < 10_000 else f"{value / 1024:.1f} GB"


def _replace(path: Path, text: str) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp makes the file private; a report is as readable as any file of its owner.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
