"""An `Outcome` for people: a table of its checks and a figure of its panels."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from headway import plots
from headway.claims import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_dict", "figure", "table"]


def table(slug: str, outcome: Outcome) -> Table:
    """The outcome's checks as a table: what, measured, baseline, threshold, verdict; the paper's figure below.

    Args:
        slug: the method's slug in the catalogue.
        outcome: what its claim returned.

    >>> from headway.claims import Check
    >>> outcome = Outcome("Fewer steps.", "half the steps", [Check("steps, share", 0.5, "<=", 0.8, baseline=1.0)])
    >>> table("faster", outcome).row_count
    1

    """
    verdict = Text(" holds", "bold green") if outcome.holds else Text(" fails", "bold red")
    shown = Table(
        title=Text.assemble((slug, "bold"), verdict, "\n", outcome.statement),
        title_justify="left",
        title_style="",
        caption=Text.assemble(("The paper: ", "dim"), outcome.paper) if outcome.paper else None,
        caption_justify="left",
        caption_style="",
    )
    shown.add_column("what", ratio=1, overflow="fold")
    for column in ("measured", "baseline", "threshold"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for check in outcome.checks:
        shown.add_row(
            Text(check.what),
            f"{check.measured:.4g}",
            "" if check.baseline is None else f"{check.baseline:.4g}",
            f"{check.relation} {check.threshold:.4g}",
            Text("holds", "green") if check.holds else Text("fails", "bold red"),
        )
    return shown


def figure(outcome: Outcome) -> Figure:
    """The outcome's panels as one matplotlib figure.

    Raises:
        ValueError: if the outcome has no panel.

    """
    return plots.figure(outcome.panels)


def as_dict(slug: str, outcome: Outcome, seed: int) -> dict[str, Any]:
    """The outcome for a program, with the versions and the machine it comes from."""
    import torch

    from headway import __version__

    return {
        "slug": slug,
        "holds": outcome.holds,
        "statement": outcome.statement,
        "paper": outcome.paper,
        "checks": [{**asdict(check), "holds": check.holds} for check in outcome.checks],
        "seed": seed,
        "headway": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
