"""Does a plan come true? For each budget: plan, train what was planned, compare.

    python benchmarks/plan_check.py [--minutes 2 5 15] [--write docs/benchmarks]

Each row is `headway plan --minutes N --write`, `headway train` and `headway plan --check`, as a user runs them. The
text is the Python standard library's, the one behind the reference, whose runs have other lengths than these. Use a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headway.plan.check import compare
from headway.plots import save
from machine import describe

NAMES = {"time, s": "time", "peak memory, MB": "memory", "validation loss, nats per token": "loss"}


def headway(*arguments: str) -> str:
    command = [sys.executable, "-m", "headway", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def one(minutes: float, folder: Path) -> dict:
    config, run = folder / "config.toml", folder / "run"
    start = time.perf_counter()
    plan = json.loads(headway("plan", "--minutes", str(minutes), "--write", str(config), "--json"))
    planning = time.perf_counter() - start
    headway("train", str(config), "--out", str(run))
    result = json.loads(headway("plan", "--check", str(run), "--json"))
    return {
        "minutes": minutes,
        "planning": planning,
        "size": plan["figures"][0]["value"],
        "steps": plan["total_steps"],
        **{key: result[key] for key in ("predicted", "actual", "errors", "inside")},
        "panel": compare(run).panels()[0],
    }


def report(rows: list[dict], machine: str) -> str:
    lines = [
        "<!-- made by benchmarks/plan_check.py -->",
        "",
        f"{machine}.",
        "",
        "| budget | model | steps | time: predicted, actual | memory, MB | validation loss | planning took |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{row['predicted'][name]:.4g}, {row['actual'][name]:.4g} ({row['errors'][name]:+.1%})" for name in NAMES
        ]
        first, last = f"| {row['minutes']:g} min | {row['size']} | {row['steps']:,} |", f"| {row['planning']:.0f} s |"
        lines.append(f"{first} {' | '.join(cells)} {last}")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 15])
    options.add_argument("--write", type=Path, help="folder for the table, the figures and the picture")
    arguments = options.parse_args()
    rows = []
    for minutes in arguments.minutes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one(minutes, Path(folder)))
        print(report(rows[-1:], "").splitlines()[-1], flush=True)
    text = report(rows, describe())
    print(text)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "plan.md").write_text(text)
        save([row.pop("panel") for row in rows], arguments.write / "plan.svg")
        (arguments.write / "plan.json").write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
