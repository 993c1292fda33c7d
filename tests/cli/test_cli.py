import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from headway import __version__
from headway.cli import app


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", ["train", "generate", "methods", "verify"])
def test_every_command_has_help_with_an_example(command):
    output = invoke(command, "--help").output
    assert "Example" in output
    assert f"headway {command}" in output


def test_the_version_is_printed():
    assert invoke("--version").output.strip() == __version__


def test_the_package_and_the_help_import_nothing_heavy():
    code = (
        "import sys, headway, headway.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_are_listed_filtered_and_machine_readable():
    assert "frugal" in invoke("methods").output
    rows = json.loads(invoke("methods", "--role", "schedule", "--json").output)
    assert {row["role"] for row in rows} == {"schedule"}
    assert "no method matches" in invoke("methods", "--find", "perpetual motion").output
    assert "adamw" in invoke("methods", "--baselines").output
    assert "did you mean 'optimizer'" in invoke("methods", "--role", "optimiser", code=2).output


def test_a_method_is_shown_with_signature_paper_claim_and_example():
    output = invoke("methods", "show", "rex").output
    for part in ("REXLR(", "2107.04197", "headway verify rex", ">>>"):
        assert part in output
    assert json.loads(invoke("methods", "show", "rex", "--json").output)["slug"] == "rex"
    assert "did you mean 'rex'" in invoke("methods", "show", "rexx", code=2).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimizer.name=fugal"], "did you mean 'frugal'"),
        (["--set", "optimizer.lr=-1"], "optimizer.lr must be > 0, got -1"),
        (["--data", "no/such/place"], "no/such/place"),
        (["nothing.toml"], "cannot read configuration"),
        (["--workers", "-2"], "launch.workers must be >= 1, got -2"),
        (["--resume", "x", "--data", "y"], "--resume takes the run's own configuration"),
    ],
)
def test_wrong_input_to_train_is_one_line_and_exit_code_2(arguments, message):
    output = invoke("train", *arguments, code=2).output
    assert message in output
    assert output.count("\n") == 1


def test_an_empty_folder_is_one_line(tmp_path):
    output = invoke("train", "--data", tmp_path, code=2).output
    assert str(tmp_path) in output.replace("\n", "")


def test_resuming_what_is_no_run_is_one_line(tmp_path):
    assert "no run in" in invoke("train", "--resume", tmp_path, code=1).output


def test_train_then_generate(tiny, tmp_path):
    run = tmp_path / "run"
    sets = [item for override in tiny for item in ("--set", override)]
    output = invoke("train", *sets, "--out", run).output
    assert "report.html" in output
    first = invoke("generate", run, "--prompt", "the run", "--tokens", 8).output
    assert first.startswith("the run")
    assert first == invoke("generate", run / "model", "--prompt", "the run", "--tokens", 8).output
    assert first != invoke("generate", run, "--prompt", "the run", "--tokens", 8, "--seed", 1).output
    assert invoke("generate", run, "--prompt", "", "--temperature", 0, "--tokens", 2).output
    assert "is complete" in invoke("train", "--resume", run).output


def test_generate_refuses_wrong_input_in_one_line(tmp_path):
    assert "no run and no model" in invoke("generate", tmp_path, code=1).output
    assert "--tokens must be >= 1" in invoke("generate", tmp_path, "--tokens", 0, code=2).output
    assert "--temperature must be >= 0" in invoke("generate", tmp_path, "--temperature", -1, code=2).output


class TestVerify:
    @pytest.fixture
    def claim(self, monkeypatch):
        from headway.claims import Check, Outcome, Panel

        measured = {"value": 0.5}

        def run(seed=0):
            panel = Panel("steps", "t", "loss", {"ours": ([1, 2, 3], [3, 2, 1])})
            return Outcome("Fewer steps.", "half", [Check("share", measured["value"], "<=", 0.6, 1.0)], [panel])

        monkeypatch.setattr("headway.catalogue.import_object", lambda path, extra="": run)
        return measured

    def test_a_claim_that_holds_exits_with_0_and_draws_its_plot(self, claim, tmp_path):
        output = invoke("verify", "rex", "--plot", tmp_path / "plot.png").output
        assert "holds" in output
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_a_claim_that_fails_exits_with_3(self, claim):
        claim["value"] = 0.7
        assert "fails" in invoke("verify", "rex", code=3).output

    def test_a_claim_that_measured_nothing_fails(self, claim):
        claim["value"] = float("nan")
        invoke("verify", "rex", code=3)

    def test_json_carries_versions_and_checks(self, claim, tmp_path):
        result = json.loads(invoke("verify", "rex", "--json", "--collect", tmp_path).stdout)
        assert result["holds"] is True
        assert result["checks"][0]["baseline"] == 1.0
        assert result["headway"] == __version__
        assert json.loads((tmp_path / "rex.json").read_text()) == result
        assert (tmp_path / "rex.svg").is_file()

    def test_all_runs_every_method(self, claim):
        assert len(json.loads(invoke("verify", "--all", "--json").stdout)) >= 4

    @pytest.mark.parametrize("arguments", [[], ["rex", "--all"], ["adamw"], ["rexx"], ["rex", "--plot", "x.doc"]])
    def test_wrong_input_exits_with_2(self, arguments):
        invoke("verify", *arguments, code=2)
