import json

import pytest

from headway.config import load
from headway.train import TrainError
from headway.train.run import MetricsLog, RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", load())


def test_records_beyond_the_checkpoint_and_a_torn_line_are_dropped_on_resume(run):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    run.metrics_file.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    MetricsLog(run, after=3, warn=pytest.fail).close()
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_costs_records_but_not_the_run(run):
    told = []
    log = MetricsLog(run, after=0, warn=told.append)
    log.write({"step": 1, "loss": 1.0})
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)
    log.write({"step": 2, "loss": 1.0})
    log.write({"step": 3, "loss": 1.0})
    log.close()
    assert told == ["metrics.jsonl is not being written: No space left on device"]


def test_numbers_become_tensorboard_scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(run, after=0, warn=pytest.fail)
    log.write({"step": 1, "loss": 2.5, "lr": 0.1})
    log.write({"step": 1, "event": "resumed", "text": "no number"})
    log.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5)]
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(TrainError, match=r"no run in .*it has no config.toml"):
        RunFolder.open(tmp_path)


def test_two_runs_started_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    first, second = (RunFolder.create(None, load()).path.name for _ in range(2))
    assert (first, second) == ("20260101-000000", "20260101-000000-2")
