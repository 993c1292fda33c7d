import json

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.config import load
from headway.plan import propose
from headway.plan.check import compare
from headway.plan.probe import Probe, _read
from headway.plan.reference import COMPARED, reference
from headway.plan.sizes import LADDER
from headway.spending import Budget
from headway.train import TrainError
from headway.train.display import Display
from headway.train.run import RunFolder
from headway.train.session import prepare_corpus, run_worker


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def a_probe(**changes):
    usual = {
        "step_seconds": 0.5,
        "evaluation_seconds": 2.0,
        "fixed_seconds": 12.0,
        "peak_memory_mb": 900.0,
        "parameters": 2_164_416,
        "lrs": (4e-3,) * 60,
        "losses": (6.0,) * 60,
    }
    return Probe(**{**usual, **changes})


@pytest.fixture
def usual():
    return load(overrides=["train.steps=320"])


@pytest.fixture
def faked(monkeypatch, usual):
    """Every measurement replaced by numbers: what is planned from them is arithmetic."""
    tried = []

    def probe(config, steps):
        tried.append((config, steps))
        early = reference().early_loss(config_size(config))
        return a_probe(losses=(early,) * steps, fixed_seconds=30.0 if len(tried) % 2 else 12.0)

    def config_size(config):
        return next(size.body() / 1e6 for size in LADDER if size.hidden_size == config.model.hidden_size)

    monkeypatch.setattr(propose, "probe", probe)
    monkeypatch.setattr(propose, "step_seconds", lambda config, corpus: 0.003 * config.model.hidden_size)
    return tried


class FakeCorpus:
    vocab_size, sequence_length, train_tokens = 2048, 256, 3_000_000


def test_steps_fill_the_time_that_is_left_after_everything_else(faked, usual):
    plan = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600))
    around = 12.0 + 9 * 2.0
    assert plan.total_steps == int((600 - around) / 0.5)
    assert plan.seconds == pytest.approx(around + plan.total_steps * 0.5)
    assert plan.config.train.steps == plan.total_steps
    assert plan.config.plan.seconds == pytest.approx(plan.seconds, abs=0.1)
    assert plan.tokens == plan.total_steps * 2048
    assert plan.lower[-1] < plan.loss < plan.upper[-1]
    assert plan.figures[0].name == "model size"
    assert all(figure.reason and figure.source for figure in plan.figures)


def test_a_plan_is_a_configuration_that_loads_again(faked, usual, tmp_path):
    plan = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600))
    file = tmp_path / "config.toml"
    file.write_text(plan.config.to_toml())
    assert load(file) == plan.config
    json.dumps(plan.to_dict(), allow_nan=False)


def test_more_time_never_means_a_smaller_model(faked, usual):
    chosen = [
        propose.make_plan(usual, FakeCorpus(), Budget(seconds=60 * minutes)).config.model.hidden_size
        for minutes in (2, 15, 240)
    ]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_a_size_that_is_asked_for_is_taken(faked, usual):
    plan = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600), size="s")
    assert plan.config.model.hidden_size == 192


def test_a_text_with_a_higher_early_loss_raises_the_whole_curve(faked, usual, monkeypatch):
    same = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600), size="s")
    monkeypatch.setattr(
        propose,
        "probe",
        lambda config, steps: a_probe(losses=(1.1 * reference().early_loss(LADDER[2].body() / 1e6),) * steps),
    )
    harder = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600), size="s")
    assert harder.loss == pytest.approx(1.1 * same.loss, rel=0.02)
    assert harder.upper[-1] / harder.loss > same.upper[-1] / same.loss


def test_several_budgets_become_one_wsd_s_run_and_its_cost_is_told(faked, usual):
    plan = propose.make_plan(usual, FakeCorpus(), Budget(seconds=600), also=[Budget(seconds=150), Budget(seconds=300)])
    total = plan.total_steps
    points = list(plan.config.schedule.options["checkpoints"])
    assert plan.config.schedule.name == "wsd-s"
    assert points == [round(total / 4), round(total / 2), total]
    assert plan.also["wsd-s"] == total < plan.also["wsd"] < plan.also["separate"] == sum(points)


def test_the_trial_run_starts_as_the_long_run_does(faked, usual):
    propose.make_plan(usual, FakeCorpus(), Budget(seconds=600))
    (pilot, steps), (again, two) = faked
    assert (pilot.schedule.name, pilot.schedule.options["warmup_steps"]) == ("constant", 20)
    assert steps == COMPARED[1]
    assert (again, two) == (pilot, 2)


def test_settings_unlike_the_reference_are_said_and_widen_the_interval(faked):
    base = load(overrides=["train.steps=320", "optimizer.lr=0.001"])
    plan = propose.make_plan(base, FakeCorpus(), Budget(seconds=600), size="s", held={"optimizer.lr"})
    assert any("optimizer.lr is 0.001" in note for note in plan.notes)
    usual = propose.make_plan(load(overrides=["train.steps=320"]), FakeCorpus(), Budget(seconds=600), size="s")
    assert plan.upper[-1] / plan.loss > usual.upper[-1] / usual.loss


@pytest.mark.parametrize(
    ("budget", "also", "message"),
    [
        (Budget(seconds=20), [], "a budget of 20 s leaves no time to train: start, compilation"),
        (Budget(tokens=2000), [], "a budget of 2,000 tokens is less than two steps of 2,048 tokens"),
        (Budget(seconds=600), [Budget(seconds=900)], "a further budget must be smaller than 10 min"),
        (Budget(seconds=600), [Budget(steps=10)], "a further budget must be smaller than 10 min and in its unit"),
    ],
)
def test_budgets_that_cannot_be_planned_for_are_refused(faked, usual, budget, also, message):
    with pytest.raises(ValueError, match=message):
        propose.make_plan(usual, FakeCorpus(), budget, also=also)


def test_values_that_are_held_stay_as_they_are(faked):
    held = {"schedule.warmup_steps": 5, "train.evaluate_every": 7, "checkpoint.every": 9, "model.hidden_size": 64}
    base = load(overrides=[f"{key}={value}" for key, value in held.items()])
    config = propose.make_plan(base, FakeCorpus(), Budget(seconds=600), held=held).config
    assert (config.schedule.options["warmup_steps"], config.train.evaluate_every) == (5, 7)
    assert (config.checkpoint.every, config.model.hidden_size, config.model.layers) == (9, 64, 4)


def test_what_a_plan_finds_out_cannot_be_held(faked, usual):
    with pytest.raises(ValueError, match=r"train\.steps is what a plan finds out"):
        propose.make_plan(usual, FakeCorpus(), Budget(seconds=600), held={"train.steps"})
    growing = load(overrides=["batch.name=ramp", "batch.max_batch=64"])
    with pytest.raises(ValueError, match=r"a plan is for a fixed batch, got batch\.name = 'ramp'"):
        propose.make_plan(growing, FakeCorpus(), Budget(seconds=600))


def test_a_model_beyond_the_memory_is_refused(faked, usual, monkeypatch):
    monkeypatch.setattr(propose, "probe", lambda config, steps: a_probe(peak_memory_mb=1e9))
    with pytest.raises(ValueError, match=r"GB free: choose a smaller --model-size or batch\.size"):
        propose.make_plan(usual, FakeCorpus(), Budget(seconds=600))


def test_a_trial_run_is_read_into_steps_evaluations_and_the_rest():
    records = []
    elapsed = 0.0
    for step in range(1, 31):
        elapsed += 20.0 if step == 1 else 0.5
        records.append({"step": step, "loss": 5.0, "lr": 1e-3, "elapsed": elapsed, "peak_memory_mb": 700.0 + step})
        if step in (15, 30):
            elapsed += 3.0
            records.append({"step": step, "validation_loss": 5.0, "elapsed": elapsed, "peak_memory_mb": 750.0})
    probe = _read(records, wall=elapsed + 7.0, parameters=10)
    assert probe.step_seconds == pytest.approx(0.5)
    assert probe.evaluation_seconds == pytest.approx(3.0)
    assert probe.fixed_seconds == pytest.approx(19.5 + 7.0)
    assert probe.peak_memory_mb == 750.0


def test_a_trial_run_that_fails_says_why(usual):
    with pytest.raises(TrainError, match=r"the trial run failed: .*no-such-file"):
        propose.probe(load(overrides=["data.source=./no-such-file-anywhere.txt"]), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "give --minutes > 0 or --budget"),
        (["--minutes", "-3"], "give --minutes > 0 or --budget"),
        (["--minutes", "3", "--budget", "10"], "give --minutes > 0 or --budget"),
        (["--budget", "ten"], "--budget: a budget is written like '640'"),
        (["--minutes", "3", "--also", "x"], "--also: a budget is written like '640'"),
        (["--minutes", "3", "--plot", "a.pdf"], "--plot takes a .png or .svg file"),
        (["--minutes", "3", "--write", "/no/such/folder/c.toml"], "--write: there is no folder"),
        (["--minutes", "3", "--workers", "0"], "--workers must be >= 1, got 0"),
        (["--check", "somewhere", "--minutes", "3"], "--check takes the run alone"),
        (["--check", "no-such-run"], "no run in 'no-such-run'"),
        (["--minutes", "3", "--data", "no-such-file"], "no-such-file"),
        (["one-epoch", "--params", "-1", "--tokens-per-iter", "10", "--iters", "5"], "params must be > 0"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_one_epoch_answers_the_worked_example_of_its_card():
    result = run("one-epoch", "--params", "15e6", "--tokens-per-iter", "13500", "--iters", "65000", "--json")
    values = json.loads(result.output)
    assert values["multiplier"] == pytest.approx(3.4205, abs=1e-4)
    assert values["iterations"] == 19_003


PLANNED = [
    "plan.total_steps=12",
    "plan.seconds=30.0",
    "plan.memory_mb=500.0",
    "plan.steps=[6, 12]",
    "plan.losses=[5.5, 5.0]",
    "plan.lower=[5.0, 4.5]",
    "plan.upper=[6.0, 5.8]",
]


def test_a_run_that_was_not_planned_or_is_not_finished_is_refused(tiny, tmp_path):
    config = load(overrides=tiny)
    unplanned = RunFolder.create(tmp_path / "a", config)
    with pytest.raises(TrainError, match=r"was not planned: its config\.toml has no"):
        compare(unplanned.path)
    planned = load(overrides=[*tiny, *PLANNED])
    unfinished = RunFolder.create(tmp_path / "b", planned)
    with pytest.raises(TrainError, match="is not finished: headway train --resume"):
        compare(unfinished.path)
    run_worker(load(overrides=[*tiny, "train.steps=10", *PLANNED]), tmp_path / "c", resume=False)
    with pytest.raises(TrainError, match="was planned for 12 steps and did 10: another run"):
        compare(tmp_path / "c")


def test_a_finished_run_is_compared_with_its_plan(tiny, tmp_path):
    planned = load(overrides=[*tiny, *PLANNED])
    run_worker(planned, tmp_path / "run", resume=False)
    result = compare(tmp_path / "run")
    assert set(result.errors()) == {"time, s", "peak memory, MB", "validation loss, nats per token"}
    actual = result.actual["validation loss, nats per token"]
    assert result.errors()["validation loss, nats per token"] == pytest.approx(5.0 / actual - 1)
    assert result.inside == (4.5 <= actual <= 5.8)
    assert result.panels()[0].curves["measured"][0][-1] == 12
    shown = run("--check", tmp_path / "run", "--plot", tmp_path / "check.png")
    assert "predicted" in shown.output
    assert (tmp_path / "check.png").stat().st_size > 1000


def test_a_plan_is_measured_written_trained_and_checked(tiny, notes, tmp_path, monkeypatch):
    """The whole way in real processes, on a toy text."""
    monkeypatch.setattr(propose, "LADDER", LADDER[:3])
    kept = [f"--set={item}" for item in tiny if item.startswith(("data.", "train.c", "train.t", "train.d", "sample"))]
    file = tmp_path / "config.toml"
    result = run("--budget", "80 steps", "--model-size", "xxs", *kept, "--set=batch.size=8", "--write", file)
    assert result.exit_code == 0, result.output
    assert "trial run" in result.output
    assert "the loss is not predicted" in " ".join(result.output.split())
    config = load(file)
    assert config.train.steps == 80
    prepare_corpus(config, Display(quiet=True))
    run_worker(config, tmp_path / "run", resume=False)
    checked = json.loads(run("--check", tmp_path / "run", "--json").output)
    assert set(checked["errors"]) == {"time, s", "peak memory, MB"}
    assert checked["inside"] is None
