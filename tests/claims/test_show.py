import io
import math

import pytest
from rich.console import Console

from headway.claims import Check, Outcome, Panel
from headway.claims.show import figure, table

LOSS = Check("final loss [nats]", 2.02134, "<=", 2.1, baseline=2.05)
SPEED = Check("speed-up", 0.5, ">=", 1.0)


def printed(outcome, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table("frugal", outcome))
    return console.file.getvalue()


def row(text, what):
    line = next(line for line in text.splitlines() if what in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_each_check_is_a_row_of_measured_baseline_threshold_and_verdict():
    text = printed(Outcome("It is smaller.", "Table 3", [LOSS, SPEED]))
    assert row(text, "final loss") == ["final loss [nats]", "2.021", "2.05", "<= 2.1", "holds"]
    assert row(text, "speed-up") == ["speed-up", "0.5", "", ">= 1", "fails"]


def test_statement_stands_above_and_the_papers_figure_below():
    text = printed(Outcome("It is smaller.", "18.6 against 18.1 [2411.07837]", [LOSS]))
    assert text.index("It is smaller.") < text.index("final loss") < text.index("18.6 against 18.1 [2411.07837]")


@pytest.mark.parametrize(
    ("checks", "verdict"), [([LOSS], "frugal holds"), ([LOSS, SPEED], "frugal fails"), ([], "frugal fails")]
)
def test_title_gives_the_verdict_of_the_whole_outcome(checks, verdict):
    assert verdict in printed(Outcome("It is smaller.", "", checks))


def test_not_a_number_is_shown_and_fails():
    cells = row(printed(Outcome("s", "", [Check("ratio", math.nan, "<=", 1.0)])), "ratio")
    assert cells == ["ratio", "nan", "", "<= 1", "fails"]


def test_numbers_stay_whole_in_a_narrow_terminal():
    cells = row(
        printed(Outcome("s", "", [Check("a long description of what is measured here", 2.0, "<=", 2.1)]), 60), "2.1"
    )
    assert cells[1:] == ["2", "", "<= 2.1", "holds"]


def test_figure_draws_the_panels():
    panels = [Panel(title, "x", "y", {"f": ([1, 2], [1, 2])}) for title in ("one", "two")]
    assert [axes.get_title("left") for axes in figure(Outcome("s", "", [LOSS], panels)).axes] == ["one", "two"]


def test_outcome_without_panels_has_no_figure():
    with pytest.raises(ValueError, match="panels must hold at least one Panel"):
        figure(Outcome("s", "", [LOSS]))
