"""The training loop: every part is a method that the configuration chose.

For each step of the run: the batch is a pure function of (seed, samples seen so far, size of the batch); it is
split over the workers and into micro-batches whose gradients add up; the gradient is clipped; optimizer and
schedule step; every now and then the model is evaluated and a checkpoint taken. The schedules of the learning rate
and of the batch size stand where the spent part of the budget puts them, be it in steps, tokens or seconds.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import headway
from headway.config import Config
from headway.config.methods import build_batch_schedule, build_optimizer, build_schedule
from headway.data import Corpus
from headway.resilience import CheckpointError, CheckpointStore
from headway.snapshot import rng_state, set_rng_state
from headway.train import TrainError
from headway.train.display import Display
from headway.train.machine import cores, processor
from headway.train.model import NextTokenLoss, build_model, one_line
from headway.train.run import MetricsLog, RunFolder
from headway.train.workers import Workers

__all__ = ["Result", "Trainer"]

# A budget of time becomes steps after this many, by the time that the last half of them took: the first compiles.
TIMED_STEPS = 10


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, the last validation loss, and whether it was interrupted."""

    steps: int
    validation_loss: float
    interrupted: bool


@dataclass
class Trainer:
    """One worker of a run.

    `run` is None for a run that keeps nothing (a measurement). After construction the model, the
    optimizer and the schedule exist and a checkpoint, if there is one, has been restored; `train()`
    does the remaining steps.
    """

    config: Config
    corpus: Corpus
    run: RunFolder | None = None
    workers: Workers = field(default_factory=Workers.from_environment)
    display: Display = field(default_factory=lambda: Display(quiet=True))

    def __post_init__(self) -> None:
        train = self.config.train
        self.micro_batch = self._micro_batch()
        self.device = self.workers.device(train.device)
        threads = train.threads or max(1, cores() // self.workers.local_count)
        torch.set_num_threads(threads)

        self.model = build_model(self.config.model, self.corpus, train.seed).to(self.device)
        torch.manual_seed(train.seed + self.workers.rank)
        self.precision = _precision(train.precision, self.device, self.display)
        self.optimizer = build_optimizer(self.config.optimizer, self.model)
        self.budget = self.config.budget
        self.total_steps = self.config.nominal_steps
        self.timed: tuple[int, float] | None = None  # step and elapsed time at which a budget of time became steps
        self._mark: tuple[int, float] | None = None  # from when on steps are timed for it
        self.schedule = build_schedule(self.config.schedule, self.optimizer, self.total_steps)
        self.batch = build_batch_schedule(
            self.config.batch,
            size=self.config.batch.size,
            workers=self.workers.count,
            unit=self.micro_batch * self.workers.count,
        )
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        self.twice = getattr(self.optimizer, "step_protocol", "gradients") == "graph"
        if self.twice:
            self._prepare_double_backward()
        # Hooks on layers do not run in a compiled graph, and a compiled graph cannot be differentiated twice.
        eager = self.twice or getattr(self.optimizer, "needs_model", False)

        self.objective: nn.Module = NextTokenLoss(self.model)
        self.compiled = train.compile and not eager and _can_compile(self.device, self.display)
        if self.compiled:
            self.objective.compile()
        if self.workers.count > 1:
            self.objective = DistributedDataParallel(self.objective)

        self.step = self.tokens = self._entered = 0
        self.seconds = self.elapsed = self.elapsed_here = 0.0  # in steps alone, all in all, and in this process
        self._clock = time.perf_counter()  # less what had elapsed before
        self.validation_loss = math.nan
        self.interrupted = self._stop_wanted = False
        self.log: MetricsLog | None = None
        self.events: list[tuple[str, str]] = []
        self.store = None
        if self.run is not None:
            self.store = CheckpointStore(self.run.checkpoints, keep=self.config.checkpoint.keep)
            if self.store.steps():
                self._restore(self.store)

    def train(self) -> Result:
        """Do the remaining steps; on an interruption, save a checkpoint and return.

        Raises:
            TrainError: the loss or the gradient is not finite and `train.on_nonfinite` is "stop".
            CheckpointError: a save failed and `checkpoint.on_error` is "stop".
        """
        config = self.config
        if self.run is not None and self.workers.rank == 0:
            self.run.write_json(self.run.environment_file, self.environment())
            self.log = MetricsLog(self.run, after=self.step, warn=self.display.warn)
            for kind, text in self.events:
                self._record({"step": self.step, "event": kind, "text": text})
        self.display.start(self.step, self.total_steps)
        self.model.train()
        entered = time.perf_counter()
        self._clock = entered - self.elapsed
        try:
            with self._interruptible(), _deterministic(self.device):
                while not self.done and not self.interrupted:
                    before = self.position()
                    self._one_step()
                    after, ends = self.position(), getattr(self.schedule, "checkpoints", ())
                    publish = not self.done and any(before < end <= after for end in ends)
                    if self.done or publish or _due(self.step, config.train.evaluate_every):
                        self.evaluate()
                    if publish:
                        self.publish()
                    if self.done or publish or self.interrupted or _due(self.step, config.checkpoint.every):
                        self.save()
        finally:
            self.elapsed_here = time.perf_counter() - entered
            self.elapsed = time.perf_counter() - self._clock
            self.display.close()
            if self.log is not None:
                self.log.close()
        return Result(self.step, self.validation_loss, self.interrupted)

    @property
    def done(self) -> bool:
        """Whether the budget is spent: one more step of the present batch would go beyond it."""
        if self.budget.seconds:
            return self.elapsed >= self.budget.seconds
        if self.budget.tokens:
            return self.tokens + self.batch.size * self.corpus.sequence_length > self.budget.tokens
        return self.step >= self.budget.steps

    def position(self) -> int:
        """The step of the schedule that the spent part of the budget stands for."""
        if self.budget.steps:
            return self.step
        last = self.total_steps - 1  # what is read while there is another step to take
        if self.budget.tokens:
            assert self.budget.tokens_per_step is not None
            return min(last, int(self.tokens / self.budget.tokens_per_step))
        if self.timed is None:
            return self.step
        step, elapsed = self.timed
        share = (self.elapsed - elapsed) / max(self.budget.seconds - elapsed, 1e-9)
        return min(last, step + int(share * (self.total_steps - step)))

    def publish(self) -> None:
        """Keep the model as it is now beside the run's final one."""
        if self.run is None or self.workers.rank > 0:
            return
        folder = self.run.published(self.step)
        try:
            with self.evaluation_point():
                self.model.save_pretrained(folder)
                self.corpus.tokenizer().save_pretrained(folder)
        except OSError as error:
            text = f"the model of step {self.step} was not written: {error.strerror or error}"
            self.display.warn(text)
            self._record({"step": self.step, "event": "model not written", "text": text})
        else:
            self.display.note(f"model of step {self.step}: {folder}")

    def _micro_batch(self) -> int:
        """Sequences per forward pass."""
        batch = self.config.batch
        if batch.size % self.workers.count:
            raise TrainError(f"batch.size must be a multiple of the workers ({self.workers.count}), got {batch.size}")
        share = batch.size // self.workers.count
        if batch.micro_batch and share % batch.micro_batch:
            raise TrainError(
                f"batch.micro_batch must divide a worker's share of the batch ({share}), got {batch.micro_batch}"
            )
        return batch.micro_batch or share

    def _prepare_double_backward(self) -> None:
        """Set up what an optimizer needs that differentiates the gradient."""
        if self.workers.count > 1:
            # DistributedDataParallel averages gradients without their graph.
            raise TrainError(
                f"optimizer '{self.config.optimizer.name}' differentiates the gradient: "
                f"launch.workers must be 1, got {self.workers.count}"
            )
        self.model.set_attn_implementation("eager")  # fused attention cannot be differentiated twice

    def _one_step(self) -> None:
        start = time.perf_counter()
        size = self.batch.size
        # This worker's mean loss; its gradients, averaged over the workers, are in .grad.
        loss = self._probing_backward() if self.batch.due(self.step) else self._backward()
        clip = self.config.train.clip_norm
        if clip:
            norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        lr = self.schedule.get_last_lr()[0] * self.batch.lr_factor
        elapsed = time.perf_counter() - self._clock
        total, stopped, elapsed = self.workers.sum(loss.item(), float(self._stop_wanted), elapsed)
        self.elapsed = elapsed / self.workers.count  # the workers must agree on it
        loss_value, grad_norm = total / self.workers.count, norm.item()
        self.interrupted = stopped > 0

        if math.isfinite(loss_value) and math.isfinite(grad_norm):
            with _scaled(self.optimizer, self.batch.lr_factor):
                self.optimizer.step()
            if getattr(self.optimizer, "hybrid", None) is not None:  # decides by the loss, as MKOR-H does
                self.optimizer.observe(loss_value)
        else:
            self._nonfinite(loss_value, grad_norm)
        self.optimizer.zero_grad()
        self.step += 1
        tokens = size * self.corpus.sequence_length
        self.tokens += tokens
        if self.budget.seconds and self.timed is None:
            self._time_the_budget()
        self._advance()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self._record(
            {
                "step": self.step,
                "loss": loss_value,
                "lr": lr,
                "grad_norm": grad_norm,
                "batch": size,
                "tokens": self.tokens,
                "tokens_per_second": tokens / seconds,
                "seconds": self.seconds,
                "elapsed": time.perf_counter() - self._clock,
                "step_seconds": seconds,
                "memory_mb": _memory_mb(self.device),
                "peak_memory_mb": _peak_memory_mb(self.device),
            }
        )

    def _advance(self) -> None:
        """Bring the schedules to where the spent part of the budget puts them."""
        position = self.position()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of")  # the very first step may have been left out
            while self.schedule.last_epoch < position:
                self.schedule.step()
        self.batch.advance(min(1.0, position / self.total_steps))

    def _time_the_budget(self) -> None:
        """Turn a budget of time into steps, once some have been timed, and lay the schedule out anew."""
        if self._mark is None:
            if self.step - self._entered >= TIMED_STEPS // 2:
                self._mark = (self.step, self.elapsed)
            return
        counted = self.step - self._mark[0]
        if counted < TIMED_STEPS - TIMED_STEPS // 2:
            return
        per_step = (self.elapsed - self._mark[1]) / counted
        left = max(0.0, self.budget.seconds - self.elapsed)
        self.total_steps = max(self.step + 1, self.step + round(left / per_step))
        self.timed = (self.step, self.elapsed)
        self._lay_out()
        self.display.start(self.step, self.total_steps)

    def _lay_out(self) -> None:
        """The schedule for `total_steps`, from its first step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        section = self.config.schedule
        fitting = min(20, self.total_steps // 10)
        if section.name in section.defaults and section.options == {"warmup_steps": 20} and fitting < 20:
            self.display.note(
                f"warm-up of {fitting} steps, a tenth of the {self.total_steps} that the budget has room for"
            )
            section = section.model_copy(update={"warmup_steps": fitting})
        try:
            self.schedule = build_schedule(section, self.optimizer, self.total_steps)
        except ValueError as error:
            raise TrainError(
                f"train.budget = {str(self.budget)!r} has room for {self.total_steps} steps on this machine: {error}"
            ) from error

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """The step's micro-batches of this worker."""
        share = self.batch.size // self.workers.count
        first = self.tokens // self.corpus.sequence_length + self.workers.rank * share
        inputs, targets = self.corpus.samples(first, share, seed=self.config.train.seed)
        return list(zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True))

    def _backward(self) -> Tensor:
        parts = self._parts()
        total = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            total += self._backward_part(part, len(parts), synchronise=index == len(parts) - 1)
        return total

    def _backward_part(self, part: tuple[Tensor, Tensor], count: int, synchronise: bool) -> Tensor:
        """The share of one of `count` micro-batches in the mean loss; its gradients are added to .grad."""
        x, y = part
        with contextlib.ExitStack() as stack:
            if isinstance(self.objective, DistributedDataParallel) and not synchronise:
                stack.enter_context(self.objective.no_sync())
            loss = self._loss(x.to(self.device), y.to(self.device)) / count
            with warnings.catch_warnings():
                # The cycle between parameter and gradient that it warns of ends with zero_grad().
                warnings.filterwarnings("ignore", "Using backward")
                loss.backward(create_graph=self.twice)
        return loss.detach()

    def _probing_backward(self) -> Tensor:
        """As `_backward`; the gradient of every micro-batch is looked at by itself, for the batch schedule."""
        from headway.schedules.gradient_noise import chunk_stats

        parts = self._parts()
        total, squares = torch.zeros((), device=self.device), 0.0
        sums: list[Tensor] | None = None
        for part in parts:
            total += self._backward_part(part, len(parts), synchronise=False)
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
            squares += _square_norm(grads) * len(parts) ** 2
            if sums is None:
                sums = grads
            else:
                torch._foreach_add_(sums, grads)
            self.optimizer.zero_grad()
        assert sums is not None
        self.workers.average(sums)
        for parameter, grad in zip(self.parameters, sums, strict=True):
            parameter.grad = grad
        (squares,) = self.workers.sum(squares)
        chunks = len(parts) * self.workers.count
        self.batch.update(chunk_stats([squares / chunks] * chunks, _square_norm(sums), self.micro_batch))
        return total

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if not self.compiled or self.step > 0:
                return self.objective(inputs, targets)
            try:
                return self.objective(inputs, targets)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                self.display.warn(f"torch.compile failed, training goes on without it: {one_line(error)}")
                self.compiled = False
                parallel = isinstance(self.objective, DistributedDataParallel)
                module: Any = self.objective.module if parallel else self.objective
                module._compiled_call_impl = None  # what Module.compile() has set
                return self.objective(inputs, targets)

    def _nonfinite(self, loss: float, grad_norm: float) -> None:
        """Name the culprit; stop, or leave the step out."""
        text = f"step {self.step + 1}: loss is {loss}, gradient norm is {grad_norm}"
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                text += f"; first parameter that is not finite: {name}"
                break
        else:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    text += f"; first gradient that is not finite: {name}"
                    break
        if self.config.train.on_nonfinite == "stop":
            self._record({"step": self.step + 1, "event": "nonfinite", "text": text})
            raise TrainError(f"{text} (to leave such steps out: train.on_nonfinite = 'skip')")
        self.display.warn(f"{text}; step left out")
        self._record({"step": self.step + 1, "event": "skipped", "text": text})

    def evaluate(self) -> float:
        """Mean loss over the validation batches, at the point that the optimizer evaluates at."""
        batches = self.corpus.validation_batches(self.micro_batch, self.config.train.evaluate_batches)
        objective = NextTokenLoss(self.model)  # not compiled: a second graph would cost more than it saves
        total, count = 0.0, 0.0
        with self.evaluation_point(), torch.no_grad():
            for index, (x, y) in enumerate(batches):
                if index % self.workers.count == self.workers.rank:
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                        loss = objective(x.to(self.device), y.to(self.device))
                    total += loss.item() * y.numel()
                    count += y.numel()
        total, count = self.workers.sum(total, count)
        self.validation_loss = total / count
        elapsed = time.perf_counter() - self._clock
        self._record(
            {
                "step": self.step,
                "validation_loss": self.validation_loss,
                "elapsed": elapsed,
                "peak_memory_mb": _peak_memory_mb(self.device),
            }
        )
        return self.validation_loss

    @contextlib.contextmanager
    def evaluation_point(self) -> Iterator[None]:
        """The model in evaluation mode, with the parameters that the optimizer reports."""
        swaps = hasattr(self.optimizer, "eval") and hasattr(self.optimizer, "train")
        self.model.eval()
        if swaps:
            self.optimizer.eval()
        try:
            yield
        finally:
            if swaps:
                self.optimizer.train()
            self.model.train()

    def save(self) -> None:
        """Take a checkpoint; a failure is told, and ends the run only if `checkpoint.on_error` says so."""
        if self.store is None:
            return
        (elapsed,) = self.workers.sum(time.perf_counter() - self._clock)
        self.elapsed = elapsed / self.workers.count
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batch": self.batch.state_dict(),
            "progress": {
                "total_steps": self.total_steps,
                "timed": self.timed,
                "elapsed": self.elapsed,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "validation_loss": self.validation_loss,
                "content_hash": self.corpus.content_hash,
            },
        }
        try:
            self.store.save(self.step, state, rank_state=rng_state())
        except CheckpointError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.display.warn(str(error))
            self._record({"step": self.step, "event": "checkpoint failed", "text": str(error)})

    def _restore(self, store: CheckpointStore) -> None:
        restored = store.load()
        progress = restored.state["progress"]
        if progress["content_hash"] != self.corpus.content_hash:
            raise TrainError(f"the text of data.source {self.config.data.source!r} is not what this run was trained on")
        self.model.load_state_dict(restored.state["model"])
        self.optimizer.load_state_dict(restored.state["optimizer"])
        laid_out = progress.get("total_steps")
        if self.budget.seconds and progress.get("timed"):
            self.timed = tuple(progress["timed"])
            self.total_steps = laid_out
            self._lay_out()
        self.schedule.load_state_dict(restored.state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate  # a state does not write its rates into the groups
        if laid_out is None:  # a checkpoint of an older version
            laid_out = getattr(self.schedule, "checkpoints", (getattr(self.schedule, "total_steps", 0),))[-1]
        if not self.budget.seconds and self.total_steps > laid_out > 0:
            self._extend(laid_out)
        if "batch" in restored.state:
            try:
                self.batch.load_state_dict(restored.state["batch"])
            except ValueError as error:
                raise TrainError(
                    f"the batch of this run does not suit {self.workers.count} workers: {error}"
                ) from error
        if restored.rank_state is not None:
            set_rng_state(restored.rank_state)
        self.step = self._entered = restored.step
        self.tokens = progress["tokens"]
        self.seconds, self.validation_loss = progress["seconds"], progress["validation_loss"]
        self.elapsed = progress.get("elapsed", self.seconds)
        self._advance()  # an extended schedule is past the end of the one before
        self.events = [("checkpoint damaged", f"checkpoint passed over: {text}") for text in restored.skipped]
        self.events.append(("resumed", f"resumed from the checkpoint at step {self.step}"))
        for _, text in self.events:
            self.display.note(text)

    def _extend(self, laid_out: int) -> None:
        """Let a schedule that was laid out for fewer steps go on."""
        if not hasattr(self.schedule, "extend"):
            raise TrainError(
                f"schedule '{self.config.schedule.name}' was laid out for {laid_out:,} steps and cannot be extended to "
                f"{self.total_steps:,}: only schedules made for it can (wsd-s)"
            )
        try:
            self.schedule.extend(self.total_steps)
        except ValueError as error:
            raise TrainError(f"the run cannot be extended to {self.total_steps:,} steps: {error}") from error

    def environment(self) -> dict[str, Any]:
        """What the run ran on."""
        return {
            "headway": headway.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "processor": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor(),
            "device": self.device.type,
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "workers": self.workers.count,
            "precision": self.precision,
            "compiled": "yes" if self.compiled else "no",
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "training tokens": self.corpus.train_tokens,
            "validation tokens": self.corpus.validation_tokens,
        }

    def _record(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write({key: value for key, value in record.items() if key != "step_seconds"})
        if "event" not in record:
            self.display.step(record)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the present step; a second SIGINT at once."""

        def stop(number: int, frame: Any) -> None:
            if self._stop_wanted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_wanted = True  # all workers stop after the same step: the next one that they agree on
            self.display.note("stopping after this step (Ctrl-C again: at once)")

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CPUs, sums in a fixed order: a resumed run repeats the interrupted one exactly, at no measurable cost.

    (Compiled code would otherwise add up the embedding's gradient with atomic operations.)
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # costs a pass over every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """The optimizer with every rate multiplied; afterwards the rates are the schedule's again."""
    if factor == 1.0:
        yield
        return
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr


def _square_norm(tensors: list[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum().item()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _precision(wanted: str, device: torch.device, display: Display) -> str:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    elif platform.machine().lower() in ("arm64", "aarch64"):
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if wanted == "auto":
        return "bf16" if native else "fp32"
    if wanted == "bf16" and not native:
        display.warn("train.precision is 'bf16', but this processor emulates it, which is many times slower than fp32")
    return wanted


def _can_compile(device: torch.device, display: Display) -> bool:
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "g++")
    if device.type == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
        display.warn(f"no C++ compiler ({compiler}) on this machine: training goes on without torch.compile")
        return False
    return True


def _memory_mb(device: torch.device) -> float:
    """Memory held now by this process (CPU) or by its tensors (GPU)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return _peak_memory_mb(device)


def _peak_memory_mb(device: torch.device) -> float:
    """The most that this process (CPU), or its tensors (GPU), have held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # Not ru_maxrss, which a process takes over from the one that started it.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
