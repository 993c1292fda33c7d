import json
import math

import pytest
import torch

from headway import catalogue
from headway.config import load
from headway.train import TrainError
from headway.train.display import Display
from headway.train.loop import Trainer
from headway.train.run import RunFolder
from headway.train.session import prepare_corpus, run_worker
from headway.train.workers import Workers


def trainer(overrides, run=None):
    config = load(overrides=overrides)
    return Trainer(config, prepare_corpus(config, Display(quiet=True)), run)


def losses(run: RunFolder) -> list[float]:
    records = map(json.loads, run.metrics_file.read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def trained(overrides, **changes) -> list[float]:
    subject = trainer([*overrides, *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())])
    seen = []
    subject.display.step = lambda record: seen.append(record["loss"]) if "loss" in record else None
    subject.train()
    return seen


def test_training_lowers_the_loss(tiny):
    seen = trained(tiny, train__steps=60, optimizer__lr=0.02)
    assert seen[-1] < seen[0] - 0.5


def test_a_run_is_a_function_of_its_seed(tiny):
    assert trained(tiny) == trained(tiny)
    assert trained(tiny) != trained(tiny, train__seed=1)


def test_micro_batches_add_up_to_the_batch(tiny):
    assert trained(tiny, batch__micro_batch=1) == pytest.approx(trained(tiny), rel=1e-5)


def test_the_first_step_is_plain_pytorch(tiny):
    """One step of the loop equals the same step written by hand."""
    subject = trainer([*tiny, "schedule.name=constant", "optimizer.name=sgd", "optimizer.lr=0.1"])
    by_hand = trainer([*tiny, "schedule.name=constant", "optimizer.name=sgd", "optimizer.lr=0.1"])
    x, y = by_hand.corpus.batch(0, batch_size=4, seed=0)
    logits = by_hand.model(input_ids=x).logits
    loss = -torch.log_softmax(logits.float(), -1).gather(-1, y[..., None]).mean()
    loss.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in by_hand.model.parameters()]))
    subject._one_step()
    for mine, p in zip(subject.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(mine, p - 0.1 * p.grad * min(1.0, 1.0 / norm.item()), rtol=1e-4, atol=1e-7)


def optimizers():
    """The slugs that `headway train` takes, baselines first."""
    rows = [row for row in [*catalogue.baselines(), *catalogue.methods()] if row.role == "optimizer"]
    return [row.slug for row in rows if getattr(row.load(), "step_protocol", "gradients") in ("gradients", "graph")]


PAIRS = [(optimizer, schedule) for optimizer in ("adamw", "frugal") for schedule in ("rex", "wsd-s", "cosine")]
PAIRS += [(optimizer, "rex") for optimizer in optimizers() if optimizer not in ("adamw", "frugal")]


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
@pytest.mark.filterwarnings("ignore:coordinate clipping")
def test_every_optimizer_goes_with_schedules_and_resumes_exactly(tiny, tmp_path, optimizer, schedule):
    chosen = [*tiny, f"optimizer.name={optimizer}", f"schedule.name={schedule}", "optimizer.lr=0.01"]
    config = load(overrides=chosen)
    whole = RunFolder.create(tmp_path / "whole", config)
    trainer(chosen, whole).train()
    parted = RunFolder.create(tmp_path / "parted", config)
    first = trainer(chosen, parted)
    first.display.step = lambda record: setattr(first, "interrupted", record["step"] >= 7)
    assert first.train().interrupted
    assert trainer(chosen, parted).train().steps == 12
    assert losses(parted) == losses(whole)


@pytest.mark.parametrize("inner", ["sgd", "frugal", "adagrad-accelerated"])
def test_a_wrapper_trains_around_any_optimizer_by_slug(tiny, inner):
    chosen = ["optimizer.name=perpgrad-stablemax", f"optimizer.inner={inner}", "optimizer.lr=0.01"]
    subject = trainer([*tiny, *chosen])
    subject.train()
    assert type(subject.optimizer.optimizer) is catalogue.get(inner, "optimizer").load()
    assert subject.optimizer.param_groups[0]["initial_lr"] == 0.01


def test_an_optimizer_that_differentiates_twice_trains_without_compiler_and_alone(tiny):
    chosen = [*tiny, "optimizer.name=adahessian", "optimizer.lr=0.05", "train.compile=true"]
    subject = trainer(chosen)
    assert not subject.compiled
    config = load(overrides=chosen)
    two = Workers(rank=0, count=2, local_rank=0, local_count=2)
    with pytest.raises(TrainError, match=r"'adahessian' differentiates the gradient: launch.workers must be 1, got 2"):
        Trainer(config, prepare_corpus(config, Display(quiet=True)), None, two)


def test_a_damaged_checkpoint_is_passed_over_and_told(tiny, tmp_path):
    config = load(overrides=tiny)
    run = RunFolder.create(tmp_path / "run", config)
    trainer(tiny, run).train()
    before = losses(run)
    newest = sorted(run.checkpoints.iterdir())[-1]
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-10])
    again = trainer(tiny, run)
    assert again.step == 8
    again.train()
    assert losses(run) == before
    events = [json.loads(line) for line in run.metrics_file.read_text().splitlines() if '"event"' in line]
    assert [event["event"] for event in events] == ["checkpoint damaged", "resumed"]


def test_a_changed_corpus_is_not_resumed_on(tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    for n in range(8):
        (tmp_path / "notes" / f"{n}.txt").write_text(f"some text number {n} " * 40)
    chosen = [*tiny, f"data.source={tmp_path / 'notes'}"]
    run = RunFolder.create(tmp_path / "run", load(overrides=chosen))
    trainer(chosen, run).train()
    (tmp_path / "notes" / "0.txt").write_text("something else entirely " * 40)
    with pytest.raises(TrainError, match="not what this run was trained on"):
        trainer(chosen, run)


def test_a_nonfinite_step_stops_with_step_and_parameter(tiny):
    subject = trainer(tiny)
    with torch.no_grad():
        subject.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(TrainError, match=r"step 1: loss is nan.*not finite: model\.layers\.1\.mlp\.up_proj\.weight"):
        subject.train()


def test_a_nonfinite_gradient_is_named_when_the_parameters_are_fine(tiny):
    subject = trainer(tiny)
    subject.model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(TrainError, match=r"first gradient that is not finite: model\.layers\.0\.self_attn\.q_proj"):
        subject.train()


def test_a_nonfinite_step_is_left_out_if_configured(tiny, tmp_path):
    chosen = [*tiny, "train.on_nonfinite=skip"]
    run = RunFolder.create(tmp_path / "run", load(overrides=chosen))
    subject = trainer(chosen, run)
    before = [p.clone() for p in subject.model.parameters()]
    subject.model.lm_head.weight.register_hook(lambda g: g * math.nan)
    subject.train()
    assert all(torch.equal(p, q) for p, q in zip(subject.model.parameters(), before, strict=True))
    assert run.metrics_file.read_text().count('"event": "skipped"') == 12


def test_the_evaluation_point_of_an_optimizer_is_used_and_left(tiny):
    subject = trainer([*tiny, "optimizer.name=adagrad-accelerated", "optimizer.variant=rsag"])
    subject.train()
    training = [p.clone() for p in subject.model.parameters()]
    with subject.evaluation_point():
        assert not subject.model.training
    assert all(torch.equal(p, q) for p, q in zip(subject.model.parameters(), training, strict=True))


def test_a_batch_that_the_workers_cannot_share_is_refused(tiny):
    config = load(overrides=tiny)
    corpus = prepare_corpus(config, Display(quiet=True))
    with pytest.raises(TrainError, match=r"batch\.size must be a multiple of the workers \(3\), got 4"):
        Trainer(config, corpus, None, Workers(rank=0, count=3, local_rank=0, local_count=3))


def test_a_failed_save_keeps_the_run_going_unless_asked(tiny, tmp_path, monkeypatch):
    from headway.resilience import CheckpointError, CheckpointStore

    def full(*args, **kwargs):
        raise CheckpointError("checkpoint at step 4 not saved: No space left on device")

    monkeypatch.setattr(CheckpointStore, "save", full)
    run = RunFolder.create(tmp_path / "run", load(overrides=tiny))
    assert trainer(tiny, run).train().steps == 12
    assert "No space left" in run.metrics_file.read_text()
    strict = [*tiny, "checkpoint.on_error=stop"]
    with pytest.raises(CheckpointError, match="No space left"):
        trainer(strict, RunFolder.create(tmp_path / "strict", load(overrides=strict))).train()


def test_a_run_leaves_what_is_promised_and_its_model_opens_in_transformers(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load(overrides=tiny)
    run, result = run_worker(config, tmp_path / "run", resume=False)
    assert result.steps == 12
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"config.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "report.html", "tensorboard"}
    assert load(run.config_file) == config
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.decode(tokenizer("a small model")["input_ids"]) == "a small model"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (run.model / "model.safetensors").is_file()


def test_a_trained_model_is_fine_tuned_with_its_own_tokenizer(tiny, tmp_path):
    run, _ = run_worker(load(overrides=tiny), tmp_path / "run", resume=False)
    tuned = [*tiny, f"model.from={run.model}", "train.steps=2", "data.vocab_size=400"]
    subject = trainer(tuned)
    assert subject.corpus.vocab_size == 300
    first = trained(tuned)[0]
    assert first < trained(tiny)[0]


def test_a_model_that_is_not_there_is_one_line(tiny, tmp_path):
    config = load(overrides=[*tiny, f"model.from={tmp_path}", "data.tokenizer=train"])
    with pytest.raises((TrainError, ValueError)) as caught:
        prepare_corpus(config, Display(quiet=True))
    assert "\n" not in str(caught.value)


def test_a_run_folder_with_something_in_it_is_refused(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(TrainError, match="run folder must be new or empty"):
        RunFolder.create(tmp_path, load(overrides=tiny))


def test_compiled_training_gives_the_losses_of_eager_training(tiny):
    assert trained(tiny, train__compile="true", train__steps=4) == pytest.approx(
        trained(tiny, train__steps=4), rel=1e-4
    )


def test_without_a_compiler_training_goes_on_and_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    config = load(overrides=[*tiny, "train.compile=true", "train.steps=2"])
    corpus = prepare_corpus(config, Display(quiet=True))
    assert Trainer(config, corpus, None, display=Display()).train().steps == 2
    assert "no C++ compiler" in capsys.readouterr().out


def test_a_compiler_that_fails_is_announced_and_replaced(tiny, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise torch._inductor.exc.InductorError(RuntimeError("no luck today"))

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    config = load(overrides=[*tiny, "train.compile=true", "train.steps=2"])
    corpus = prepare_corpus(config, Display(quiet=True))
    assert Trainer(config, corpus, None, display=Display()).train().steps == 2
    assert "torch.compile failed, training goes on without it" in capsys.readouterr().out
