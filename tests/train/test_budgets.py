"""The loop under budgets of tokens and time, under batch schedules, and past the end of a first budget."""

import json
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from headway.cli import app
from headway.config import ConfigError, load
from headway.resilience import CheckpointStore
from headway.train import TrainError
from headway.train.display import Display
from headway.train.loop import TIMED_STEPS, Trainer
from headway.train.run import RunFolder
from headway.train.session import prepare_corpus, run_worker


def build(overrides, run=None):
    config = load(overrides=overrides)
    return Trainer(config, prepare_corpus(config, Display(quiet=True)), run)


def steps_of(subject) -> list[dict]:
    """Train, and return the records of the steps."""
    seen = []
    subject.display.step = lambda record: seen.append(dict(record)) if "loss" in record else None
    subject.train()
    return seen


def logged(run: RunFolder) -> list[dict]:
    records = map(json.loads, run.metrics_file.read_text().splitlines())
    return [record for record in records if "loss" in record]


def budget(text):
    return ["train.steps=0", f"train.budget={text}"]


def test_a_budget_of_tokens_equals_the_steps_that_it_pays_for(tiny):
    by_tokens = steps_of(build([*tiny, *budget("800 tokens")]))
    by_steps = steps_of(build([*tiny, "train.steps=12"]))
    assert len(by_tokens) == 12  # of 64 tokens each; the rest is less than a step
    assert [(r["loss"], r["lr"]) for r in by_tokens] == [(r["loss"], r["lr"]) for r in by_steps]


class Clock:
    """A clock that a test moves on by a fixed time per look."""

    def __init__(self, per_look):
        self.now, self.per_look = 0.0, per_look

    def __call__(self):
        self.now += self.per_look
        return self.now


def test_a_budget_of_time_ends_on_time_with_the_schedule_at_its_end(tiny, monkeypatch):
    monkeypatch.setattr("headway.train.loop.time.perf_counter", Clock(0.5))
    subject = build([*tiny, *budget("90s"), "schedule.name=rex", "schedule.warmup_steps=4", "train.evaluate_every=0"])
    seen = steps_of(subject)
    assert 90 <= seen[-1]["elapsed"] < 93
    rates = [record["lr"] for record in seen]
    assert rates[:5] == [pytest.approx(4e-3 * part / 4) for part in range(5)]
    assert len(rates) > 3 * TIMED_STEPS
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.15 * 4e-3


def test_a_budget_of_time_slows_its_schedule_when_the_machine_gets_faster(tiny, monkeypatch):
    clock = Clock(0.5)
    monkeypatch.setattr("headway.train.loop.time.perf_counter", clock)
    subject = build([*tiny, *budget("90s"), "schedule.name=linear", "train.evaluate_every=0"])
    seen = []

    def look(record):
        seen.append(dict(record))
        if record["step"] == 20:
            clock.per_look = 0.1

    subject.display.step = lambda record: look(record) if "loss" in record else None
    subject.train()
    rates = [record["lr"] for record in seen]
    assert len(rates) > subject.total_steps
    assert rates[-1] < 0.1 * rates[12]  # the decay still ends with the budget


def test_a_budget_of_time_too_short_for_the_warm_up_says_so(tiny, monkeypatch):
    monkeypatch.setattr("headway.train.loop.time.perf_counter", Clock(0.5))
    subject = build([*tiny, *budget("30s"), "schedule.name=rex", "schedule.warmup_steps=100"])
    with pytest.raises(TrainError, match=r"train.budget = '30 s' has room for \d+ steps on this machine: warmup_steps"):
        subject.train()


def test_an_interrupted_run_on_a_budget_of_time_goes_on_with_what_is_left(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("headway.train.loop.time.perf_counter", Clock(0.5))
    overrides = [*tiny, *budget("120s"), "train.evaluate_every=0", "schedule.name=linear"]
    run = RunFolder.create(tmp_path / "run", load(overrides=overrides))
    first = build(overrides, run)
    first.display.step = lambda record: setattr(first, "interrupted", record["step"] == 20)
    assert first.train().interrupted
    second = build(overrides, run)
    assert (second.step, second.total_steps, second.timed) == (first.step, first.total_steps, first.timed)
    assert second.optimizer.param_groups[0]["lr"] == second.schedule.get_last_lr()[0] > 0
    steps_of(second)
    rates = [record["lr"] for record in logged(run)]
    assert 120 <= second.elapsed < 125
    assert all(a >= b for a, b in pairwise(rates[1:]))
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("step", [3, 7, 12])
def test_a_budget_of_time_may_be_interrupted_before_it_is_timed(tiny, monkeypatch, tmp_path, step):
    monkeypatch.setattr("headway.train.loop.time.perf_counter", Clock(0.5))
    overrides = [*tiny, *budget("120s"), "train.evaluate_every=0", "schedule.name=linear"]
    run = RunFolder.create(tmp_path / "run", load(overrides=overrides))
    first = build(overrides, run)
    first.display.step = lambda record: setattr(first, "interrupted", record["step"] == step)
    first.train()
    second = build(overrides, run)
    assert second.step == step
    steps_of(second)
    rates = [record["lr"] for record in logged(run)]
    assert 120 <= second.elapsed < 125
    assert rates[-1] < 0.1 * max(rates)


def test_the_default_warm_up_shrinks_with_what_a_budget_of_time_has_room_for(tiny, monkeypatch):
    monkeypatch.setattr("headway.train.loop.time.perf_counter", Clock(0.5))
    subject = build([*tiny, *budget("60s"), "train.evaluate_every=0"])
    told = []
    subject.display.note = lambda text, **_: told.append(text)
    rates = [record["lr"] for record in steps_of(subject)]
    assert any("warm-up of" in text for text in told)
    assert rates[-1] < 0.3 * max(rates)


WSDS = ["schedule.name=wsd-s"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.budget=10 parsecs"], "a budget is written like '640'"),
        (["train.budget=10min", "train.steps=5"], "train.steps must be left out beside train.budget = '10min', got 5"),
        (["train.steps=0"], "train.steps must be >= 1, got 0"),
        (["train.budget=0 tokens"], "train.budget: a budget must be > 0"),
        (
            ["train.budget=10 tokens"],
            "train.budget: a budget must pay for at least one step, 2048 tokens, got 10",
        ),
        ([*WSDS, "schedule.checkpoints=[6]"], r"must end with the last step of the run \(320\), got \[6\]"),
        (
            ["schedule.name=wsd-s", "schedule.checkpoints=[6]", "train.budget=1h"],
            "must be left out beside a budget of time",
        ),
        (["train.budget=5000 tokens", "schedule.name=rex", "schedule.warmup_steps=3"], "warmup_steps must be < total"),
        (["batch.name=rampp"], r"batch.name: unknown batch schedule method 'rampp' \(did you mean 'ramp'"),
        (["batch.name=ramp", "batch.max_batch=2"], "max_batch"),
        (["batch.name=ramp", "batch.max_batch=64", "batch.factr=2"], "unknown key 'batch.factr' for ramp"),
    ],
)
def test_wrong_budgets_and_batch_schedules_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(overrides=overrides)
    assert "\n" not in str(error.value)


RAMP = ["batch.name=ramp", "batch.max_batch=16", "batch.at=[0.25, 0.5]", "batch.factor=2.0"]


def test_a_ramp_grows_the_batch_by_accumulation(tiny):
    subject = build([*tiny, *RAMP])
    seen = steps_of(subject)
    assert [record["batch"] for record in seen] == [4] * 3 + [8] * 3 + [16] * 6
    assert subject.micro_batch == 4
    assert subject.tokens == 16 * (3 * 4 + 3 * 8 + 6 * 16)


def test_no_sample_is_left_out_or_repeated_while_the_batch_grows(tiny, monkeypatch):
    subject = build([*tiny, *RAMP])
    asked = []
    samples = subject.corpus.samples

    def watched(first, count, *, seed):
        asked.append((first, count))
        return samples(first, count, seed=seed)

    monkeypatch.setattr(subject.corpus, "samples", watched)
    subject.train()
    assert asked[0][0] == 0
    assert all(a + count == b for (a, count), (b, _) in pairwise(asked))


def test_the_rate_follows_the_batch_as_the_rule_says(tiny):
    plain = steps_of(build([*tiny, *RAMP, "batch.lr_rule=none", "schedule.name=constant"]))
    root = steps_of(build([*tiny, *RAMP, "batch.lr_rule=sqrt", "schedule.name=constant"]))
    assert [r["lr"] / p["lr"] for r, p in zip(root, plain, strict=True)] == pytest.approx(
        [1.0] * 3 + [2**0.5] * 3 + [2.0] * 6
    )


def test_a_growing_batch_on_a_budget_of_tokens_spends_them_and_no_more(tiny):
    subject = build([*tiny, *RAMP, *budget("4000 tokens"), "schedule.name=linear"])
    seen = steps_of(subject)
    assert subject.tokens <= 4000 < subject.tokens + seen[-1]["batch"] * 16
    assert seen[-1]["lr"] < 0.3 * max(record["lr"] for record in seen)


def test_a_run_with_a_growing_batch_resumes_exactly(tiny, tmp_path):
    overrides = [*tiny, *RAMP, "checkpoint.every=5"]
    whole = steps_of(build(overrides))
    run = RunFolder.create(tmp_path / "run", load(overrides=overrides))
    first = build(overrides, run)
    first.display.step = lambda record: setattr(first, "interrupted", record["step"] == 5)
    first.train()
    build(overrides, run).train()
    assert [(r["loss"], r["batch"]) for r in logged(run)] == [(r["loss"], r["batch"]) for r in whole]


ADAPTIVE = ["batch.name=adadagrad", "batch.max_batch=32", "batch.micro_batch=2", "batch.eta=0.3"]


def test_adaptive_batches_grow_and_resume_exactly(tiny, tmp_path):
    overrides = [*tiny, *ADAPTIVE, "checkpoint.every=4"]
    whole = steps_of(build(overrides))
    sizes = [record["batch"] for record in whole]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4 < sizes[-1] <= 32
    run = RunFolder.create(tmp_path / "run", load(overrides=overrides))
    first = build(overrides, run)
    first.display.step = lambda record: setattr(first, "interrupted", record["step"] == 4)
    first.train()
    build(overrides, run).train()
    assert [(r["loss"], r["batch"]) for r in logged(run)] == [(r["loss"], r["batch"]) for r in whole]


def test_looking_at_micro_batches_one_by_one_changes_no_gradient(tiny):
    looking, plain = (build([*tiny, *ADAPTIVE, "batch.max_batch=4"]) for _ in range(2))
    assert looking._probing_backward().item() == pytest.approx(plain._backward().item(), rel=1e-6)
    for a, b in zip(looking.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_statistics_from_micro_batches_estimate_those_from_samples(tiny):
    """On average over the batch's parts: the variance per sample, from parts of two and from parts of one."""
    found = {}
    for micro in (1, 2):
        subject = build([*tiny, *ADAPTIVE, f"batch.micro_batch={micro}", "batch.size=64", "batch.max_batch=128"])
        stats = []
        subject.batch.update = stats.append
        subject._probing_backward()
        found[micro] = stats[0]
    assert found[1].grad_sq == pytest.approx(found[2].grad_sq, rel=1e-4)
    assert found[1].var_l1 == pytest.approx(found[2].var_l1, rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.name=adadagrad", "batch.max_batch=32"], r"batch\.micro_batch must be at most half of batch\.size"),
        ([*ADAPTIVE, "batch.test=ip"], r"these settings need the gradient of every sample"),
        (
            ["batch.name=ramp", "batch.max_batch=6"],
            r"max_batch must be a multiple of launch\.workers x micro-batch = 4",
        ),
        ([*RAMP, "batch.multiple_of=1"], r"unknown key 'batch\.multiple_of' for ramp"),
    ],
)
def test_a_batch_schedule_that_the_loop_cannot_drive_is_refused(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(overrides=[*tiny, *overrides])


WSD = ["schedule.name=wsd-s", "schedule.decay_fraction=0.25", "optimizer.name=adamw", "optimizer.lr=0.01"]
ignore_short_decays = pytest.mark.filterwarnings("ignore:the decay before checkpoint")


@ignore_short_decays
def test_a_finished_run_goes_on_to_a_larger_budget_and_keeps_both_models(tiny, tmp_path):
    overrides = [*tiny, *WSD]
    folder = tmp_path / "run"
    run_worker(load(overrides=overrides), folder, resume=False)
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--budget", "24"])
    assert result.exit_code == 0, result.output
    rates = [record["lr"] for record in logged(RunFolder(folder))]
    assert len(rates) == 24
    assert rates[11] == pytest.approx(0.001)
    assert rates[12] == pytest.approx(0.01)
    assert rates[23] == pytest.approx(0.001)
    for model in (folder / "model", folder / "models" / "step-000012"):
        assert (model / "config.json").is_file()
    both = steps_of(build([*tiny, *WSD, "schedule.checkpoints=[12, 24]", "train.steps=24"]))
    assert [record["loss"] for record in both] == [record["loss"] for record in logged(RunFolder(folder))]
    again = load(folder / "config.toml")  # repeats the run
    assert (again.train.steps, list(again.schedule.options["checkpoints"])) == (24, [12, 24])


@ignore_short_decays
def test_a_budget_of_tokens_is_extended_alike(tiny, tmp_path):
    folder = tmp_path / "run"
    run_worker(load(overrides=[*tiny, *WSD, *budget("768 tokens")]), folder, resume=False)
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--budget", "1536 tokens"])
    assert result.exit_code == 0, result.output
    both = steps_of(build([*tiny, *WSD, "schedule.checkpoints=[12, 24]", *budget("1536 tokens")]))
    found = logged(RunFolder(folder))
    assert [(r["lr"], r["loss"]) for r in found] == [(r["lr"], r["loss"]) for r in both]


@ignore_short_decays
def test_a_model_is_published_where_the_schedule_is_at_a_checkpoint_whatever_the_step(tiny, tmp_path):
    ramp = ["batch.name=ramp", "batch.max_batch=16", "batch.at=[0.1]", "batch.factor=4.0"]
    config = load(overrides=[*tiny, *WSD, *ramp, *budget("3072 tokens"), "schedule.checkpoints=[24, 48]"])
    run, _ = run_worker(config, tmp_path / "run", resume=False)
    records = logged(run)
    (folder,) = (run.path / "models").iterdir()
    step = int(folder.name.removeprefix("step-"))
    assert records[step - 1]["tokens"] >= 24 * 64 > records[step - 2]["tokens"]


@ignore_short_decays
def test_a_run_of_an_older_version_is_extended_too(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run_worker(load(overrides=[*tiny, *WSD]), folder, resume=False)
    load_checkpoint = CheckpointStore.load

    def older(store):
        restored = load_checkpoint(store)
        for key in ("total_steps", "timed", "elapsed"):
            del restored.state["progress"][key]
        return restored

    monkeypatch.setattr(CheckpointStore, "load", older)
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--budget", "24"])
    assert result.exit_code == 0, result.output
    assert logged(RunFolder(folder))[-1]["lr"] == pytest.approx(0.001)


@ignore_short_decays
def test_one_run_publishes_a_model_at_every_checkpoint_of_its_schedule(tiny, tmp_path):
    overrides = [*tiny, *WSD, "schedule.checkpoints=[6, 12]"]
    run_worker(load(overrides=overrides), tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "models" / "step-000006" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@ignore_short_decays
@pytest.mark.parametrize(
    ("schedule", "wanted", "message"),
    [
        (["schedule.name=rex"], "24", "the schedule 'rex' was laid out for 12 steps and cannot go on"),
        (WSD, "6", "must be at least what the run has, 12 steps, got '6'"),
        (WSD, "10 min", "a run is extended in steps or tokens; this run has 12 steps, got '10 min'"),
        (WSD, "1M tokens", "this run's budget is 12 steps: give it in steps, got '1M tokens'"),
        (WSD, "soon", "a budget is written like '640'"),
        ([*WSD, "schedule.rewarmup_steps=5"], "14", "rewarmup_steps must be <= 2"),
        ([*WSD, "schedule.decay_of=total"], "13", "checkpoint"),
    ],
)
def test_a_budget_that_a_run_cannot_take_is_refused_and_changes_nothing(tiny, tmp_path, schedule, wanted, message):
    folder = tmp_path / "run"
    run_worker(load(overrides=[*tiny, *schedule, "train.steps=12"]), folder, resume=False)
    before = (folder / "config.toml").read_text()
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--budget", wanted])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert (folder / "config.toml").read_text() == before
    assert (folder / "model" / "config.json").is_file()
