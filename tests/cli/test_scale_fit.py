import json

import numpy as np
import pytest
from typer.testing import CliRunner

from headway.budget.scale_rl import sigmoid_curve
from headway.cli import app


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["scale-fit", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result


def write(path, compute):
    performance = sigmoid_curve(compute, asymptote=0.61, exponent=1.92, midpoint=2542, initial=0.30)
    performance = performance + 0.003 * np.random.default_rng(0).standard_normal(len(compute))
    rows = [f"{i},{c},{p}" for i, (c, p) in enumerate(zip(compute, performance, strict=True))]
    path.write_text("\n".join(["step,gpu_hours,pass_rate", *rows]) + "\n")
    return path


@pytest.fixture
def runs(tmp_path):
    return write(tmp_path / "runs.csv", np.linspace(1500, 8000, 27))


COLUMNS = ("--x", "gpu_hours", "--y", "pass_rate", "--initial", 0.30)


def test_help_has_the_example():
    assert "headway scale-fit runs.csv" in invoke("--help").output


def test_asymptote_and_forecast_are_printed(runs):
    output = invoke(runs, *COLUMNS, "--forecast", 16000).output
    assert "asymptote" in output
    assert "at 16000" in output
    assert "not identified" not in output
    assert "warning" not in output


def test_json_holds_fit_intervals_and_every_forecast(runs):
    result = json.loads(invoke(runs, *COLUMNS, "--forecast", 16000, "--forecast", 12000, "--json").stdout)
    low, high = result["asymptote_interval"]
    assert low < 0.61 < high
    assert result["identified"] is True
    assert result["points"] == 27
    assert [row["compute"] for row in result["forecast"]] == [16000, 12000]
    truth = sigmoid_curve(16000, asymptote=0.61, exponent=1.92, midpoint=2542, initial=0.30)
    assert result["forecast"][0]["performance"] == pytest.approx(truth, abs=0.01)
    assert result["warnings"] == []


def test_a_far_forecast_is_warned_about_apart_from_the_json(runs):
    result = invoke(runs, *COLUMNS, "--forecast", 1e5, "--json")
    assert "twice the fitted range" in json.loads(result.stdout)["warnings"][0]
    assert "warning: compute 100000 is beyond 16000" in invoke(runs, *COLUMNS, "--forecast", 1e5).stderr


def test_an_early_window_is_called_not_identified(tmp_path):
    early = write(tmp_path / "early.csv", np.linspace(200, 1271, 41))
    assert "not identified" in invoke(early, *COLUMNS).output


def test_the_plot_is_written(runs, tmp_path):
    invoke(runs, *COLUMNS, "--forecast", 16000, "--plot", tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--x", "gpu_hour", "--y", "pass_rate"), "has no column 'gpu_hour' (did you mean 'gpu_hours'?)"),
        (("--x", "step", "--y", "pass_rate"), "compute must be > 0, got 0 at position 0"),
        ((*COLUMNS, "--initial", "-1"), "initial must be >= 0 or None, got -1.0"),
        ((*COLUMNS, "--level", "1"), "level must be in (0, 1), got 1.0"),
        ((*COLUMNS, "--min-compute", "7800"), "at least 4 points with a weight at or above min_compute = 7800, got 1"),
        ((*COLUMNS, "--max-asymptote", "0.4"), "performance must be in [0, max_asymptote = 0.4]"),
        ((*COLUMNS, "--forecast", "0"), "--forecast must be > 0 and finite, got 0"),
        ((*COLUMNS, "--forecast", "inf"), "--forecast must be > 0 and finite, got inf"),
        ((*COLUMNS, "--plot", "fit.doc"), "--plot takes a name ending in .png or .svg"),
        ((*COLUMNS, "--plot", "no/such/folder/fit.png"), "there is no folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(runs, arguments, message):
    output = invoke(runs, *arguments, code=2).output
    assert message in output
    assert output.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path):
    output = invoke(tmp_path / "none.csv", code=2).output
    assert "No such file" in output
    assert output.count("\n") == 1
