"""From a budget and measurements to a configuration, each figure with its reason and source."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from headway.catalogue import get
from headway.config import Config, parse
from headway.config.methods import build_schedule
from headway.data import Corpus
from headway.plan.machine import Machine, measure_machine
from headway.plan.probe import Probe, probe, step_seconds, with_schedule
from headway.plan.reference import COMPARED, Reference, reference
from headway.plan.sizes import LADDER, Size, size_named
from headway.plots import Panel
from headway.schedules.wsd_s import DecayBranchPlanner
from headway.spending import Budget

__all__ = ["Figure", "Plan", "make_plan", "rates_of"]

# Of the memory that is free, what a run may plan to use.
MEMORY_SHARE = 0.8
# Bytes per parameter: weight, gradient and two moments in float32.
STATE_BYTES = 16
# The pilot: steps on the user's own text, fewer where they would take more than this share of the budget.
PILOT_STEPS = 60
PILOT_SHARE = 0.2
EVALUATIONS = 8
# Ten times the compute-optimal ratio of tokens to parameters: past it a size nears its limit, where the law's runs end.
MOST_TOKENS_PER_PARAMETER = 200


@dataclass(frozen=True)
class Figure:
    """One figure of a plan: its name, its value in words, why it is what it is, and where the rule comes from."""

    name: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Plan:
    """A proposed run and what it will give.

    `seconds` is the whole command, `memory_mb` the peak of one worker; `losses` are validation losses in nats
    per token after `steps`, inside [`lower`, `upper`] with a probability of about 0.95; all four are empty for a
    run so short that the law does not reach it. `also` lists, for every
    smaller budget asked for, what models at all budgets cost together by each way to get them.
    """

    config: Config
    machine: Machine
    figures: tuple[Figure, ...]
    total_steps: int
    tokens: int
    seconds: float
    memory_mb: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    notes: tuple[str, ...] = ()
    also: dict[str, int] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The validation loss at the end, NaN where it is not predicted."""
        return self.losses[-1] if self.losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the configuration included."""
        values = {key: value for key, value in asdict(self).items() if key != "config"}
        return {**values, "machine": self.machine.to_dict(), "config": self.config.model_dump(by_alias=True)}

    def panels(self) -> list[Panel]:
        """The predicted validation loss with its interval."""
        steps = list(self.steps)
        return [
            Panel(
                f"Predicted validation loss, {self.seconds / 60:.1f} min",
                "step",
                "nats per token",
                {
                    "upper end": (steps, list(self.upper)),
                    "lower end": (steps, list(self.lower)),
                    "predicted": (steps, list(self.losses)),
                },
                styles={"upper end": "faint", "lower end": "faint"},
            )
        ]


def make_plan(
    base: Config,
    corpus: Corpus,
    budget: Budget,
    *,
    size: str = "auto",
    also: Sequence[Budget] = (),
    held: Collection[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Measure, choose, try, and predict.

    Args:
        base: the configuration to start from: what it sets away from the defaults is kept.
        corpus: its prepared text.
        budget: seconds or tokens (or steps) of the whole run.
        size: "auto" or the name of a size in `headway.plan.sizes.LADDER`.
        also: smaller budgets, in the unit of `budget`, at which a model is wanted too.
        held: keys (`section.key`) of `base` that the plan must leave as they are.
        tell: called with a line for each thing that is about to be done.

    Raises:
        ValueError: an argument cannot be used; one line.
        TrainError: the trial run failed.
    """
    chosen = None if size == "auto" else size_named(size)
    for key in ("train.steps", "train.budget"):
        if key in held:
            raise ValueError(f"{key} is what a plan finds out: give the budget itself")
    if base.batch.name != "fixed":
        raise ValueError(f"a plan is for a fixed batch, got batch.name = {base.batch.name!r}")
    for smaller in also:
        if _unit(smaller) != _unit(budget) or _amount(smaller) >= _amount(budget):
            raise ValueError(f"a further budget must be smaller than {budget} and in its unit, got {smaller}")
    tell("measuring matrix products and memory")
    machine = measure_machine()
    ref = reference()
    vocabulary, length = corpus.vocab_size, corpus.sequence_length
    tokens_per_step = base.batch.size * length
    figures: list[Figure] = []

    given = base.model.from_ or any(key.startswith("model.") for key in held)
    if given and chosen is not None:
        raise ValueError(f"model size must be auto where the configuration gives the model, got {size!r}")
    cost = None
    if given:
        config = base
        tell("the model is given: no size to choose")
    else:
        small, large = LADDER[0], LADDER[2]
        tell(f"timing steps of two small sizes ({small.name}, {large.name})")
        times = [step_seconds(_with(base, candidate, held), corpus) for candidate in (small, large)]
        cost = _StepCost.fit([small, large], times, vocabulary, length, tokens_per_step, base.launch.workers)
        if chosen is None:
            chosen = _best_size(ref, cost, machine, budget, base, held, vocabulary, tokens_per_step)
            ratio = cost.tokens(chosen, budget, tokens_per_step) / chosen.body()
            figures.append(
                Figure(
                    "model size",
                    f"{chosen.name}: {chosen.parameters(vocabulary) / 1e6:.2f} M parameters",
                    f"the lowest predicted loss of the sizes {LADDER[0].name} to {LADDER[-1].name} that fit, at up to "
                    f"{MOST_TOKENS_PER_PARAMETER} tokens per parameter without embedding (here {ratio:.1f})",
                    "step times measured here; loss by reference.json",
                )
            )
        else:
            figures.append(Figure("model size", chosen.name, "as asked for", "--model-size"))
        config = _with(base, chosen, held)

    guess = _guessed_steps(config, corpus, budget, cost, chosen)
    config = _configured(config, guess, held)
    pilot_steps = max(2, min(PILOT_STEPS, int(guess * PILOT_SHARE)))
    tell(f"training {pilot_steps} steps of the chosen run for its speed, memory and early loss")
    flat = with_schedule(config, "constant", warmup_steps=config.schedule.options.get("warmup_steps", 0))
    pilot = probe(flat, pilot_steps)
    tell("starting it once more, now that its kernels are compiled")
    again = probe(flat, 2)

    steps, seconds = _fit_in(budget, pilot, again, tokens_per_step)
    config = _configured(config, steps, held)
    memory = again.peak_memory_mb  # the first start compiles, which takes memory of its own
    if machine.device == "cpu" and memory * 2**20 * base.launch.workers > machine.memory_bytes:
        raise ValueError(
            f"the run needs {memory * base.launch.workers / 1024:.1f} GB, this machine has "
            f"{machine.memory_bytes / 2**30:.1f} GB free: choose a smaller --model-size or batch.size"
        )
    return _assemble(config, corpus, machine, budget, ref, pilot, steps, seconds, memory, figures, also)


@dataclass(frozen=True)
class _StepCost:
    """Seconds of a step of any size: overhead + operations / rate, from two measured ones."""

    overhead: float
    rate: float
    vocabulary: int
    length: int
    tokens_per_step: int

    @classmethod
    def fit(
        cls, sizes: Sequence[Size], times: Sequence[float], vocabulary: int, length: int, tokens: int, workers: int
    ) -> _StepCost:
        # Timed on the share of the cores that one of the workers has, which together then are as many times faster.
        work = [size.flops_per_token(vocabulary, length) * tokens for size in sizes]
        rate = (work[1] - work[0]) / max(times[1] - times[0], 1e-9)
        # A machine that is busy for one of the two gives no sensible line: then time is taken to be all operations.
        if times[1] <= times[0]:
            rate = work[1] / times[1]
        overhead = max(0.0, times[0] - work[0] / rate)
        return cls(overhead, rate * workers, vocabulary, length, tokens)

    def seconds(self, size: Size) -> float:
        return self.overhead + size.flops_per_token(self.vocabulary, self.length) * self.tokens_per_step / self.rate

    def tokens(self, size: Size, budget: Budget, tokens_per_step: int) -> float:
        if budget.seconds:
            return budget.seconds / self.seconds(size) * tokens_per_step
        return budget.tokens or budget.steps * tokens_per_step


def _best_size(
    ref: Reference,
    cost: _StepCost,
    machine: Machine,
    budget: Budget,
    base: Config,
    held: Collection[str],
    vocabulary: int,
    tokens_per_step: int,
) -> Size:
    """The size with the lowest predicted loss of those that fit, get a hundred steps and are not used up."""
    found: list[tuple[bool, float, Size]] = []
    for size in LADDER:
        steps = int(cost.tokens(size, budget, tokens_per_step) / tokens_per_step)
        bytes_needed = STATE_BYTES * size.parameters(vocabulary) * base.launch.workers
        if size is not LADDER[0] and (steps < 100 or bytes_needed > MEMORY_SHARE * machine.memory_bytes):
            break
        spent = steps * tokens_per_step > MOST_TOKENS_PER_PARAMETER * size.body()
        config = _configured(_with(base, size, held), max(2, steps))
        loss = ref.losses(size.body() / 1e6, rates_of(config, max(2, steps)), tokens_per_step)[-1]
        found.append((spent, loss if math.isfinite(loss) else math.inf, size))
    # Of equal losses the smaller size; if all are used up, the largest.
    return found[-1][2] if all(spent for spent, *_ in found) else min(found, key=lambda entry: entry[:2])[2]


def _with(base: Config, size: Size, held: Collection[str] = ()) -> Config:
    """The configuration with this size, and the rate that goes with it unless the optimizer is held."""
    changes = [f"model.{key}={value}" for key, value in size.section().items()]
    if not any(key.startswith("optimizer.") for key in held):
        changes.append(f"optimizer.lr={size.learning_rate()}")
    return parse(base.to_toml(), changes)


def _configured(config: Config, steps: int, held: Collection[str] = ()) -> Config:
    """The configuration with this many steps, and what follows from their number."""
    every = max(1, math.ceil(steps / EVALUATIONS))
    changes = {"train.steps": steps, "train.budget": '""', "train.evaluate_every": every, "checkpoint.every": every}
    if "warmup_steps" in config.schedule.options:
        changes["schedule.warmup_steps"] = min(20, steps // 10)
    return parse(config.to_toml(), [f"{key}={value}" for key, value in changes.items() if key not in held])


def rates_of(config: Config, steps: int) -> list[float]:
    """The learning rate of every step of a run."""
    import torch

    peak = config.optimizer.options.get("lr", 1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = build_schedule(config.schedule, optimizer, steps)
    if hasattr(schedule, "lr_at"):
        return [float(schedule.lr_at(step)[0]) for step in range(steps)]
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def _guessed_steps(
    config: Config,
    corpus: Corpus,
    budget: Budget,
    cost: _StepCost | None,
    size: Size | None,
) -> int:
    """Steps before the trial run: by the two timed sizes, or by timing the given model itself."""
    if not budget.seconds:
        return max(2, budget.steps or budget.tokens // (config.batch.size * corpus.sequence_length))
    per_step = cost.seconds(size) if cost is not None and size is not None else step_seconds(config, corpus)
    return max(2, int(budget.seconds / per_step))


def _fit_in(budget: Budget, pilot: Probe, again: Probe, tokens_per_step: int) -> tuple[int, float]:
    """The steps that fill the budget, and the seconds that they take with all that comes around them."""
    around = again.fixed_seconds + (EVALUATIONS + 1) * pilot.evaluation_seconds
    if budget.seconds:
        steps = int((budget.seconds - around) / pilot.step_seconds)
        if steps < 2:
            raise ValueError(
                f"a budget of {budget} leaves no time to train: start, compilation, evaluations and the report take "
                f"{around:.0f} s on this machine"
            )
    else:
        steps = budget.steps or budget.tokens // tokens_per_step
        if steps < 2:
            raise ValueError(f"a budget of {budget} is less than two steps of {tokens_per_step:,} tokens")
    return steps, around + steps * pilot.step_seconds


def _assemble(
    config: Config,
    corpus: Corpus,
    machine: Machine,
    budget: Budget,
    ref: Reference,
    pilot: Probe,
    steps: int,
    seconds: float,
    memory: float,
    figures: list[Figure],
    also: Sequence[Budget],
) -> Plan:
    tokens_per_step = config.batch.size * corpus.sequence_length
    tokens = steps * tokens_per_step
    matrices = 1 if config.model.tie_embeddings else 2  # the embedding, and an output of its own
    body = (pilot.parameters - matrices * corpus.vocab_size * config.model.hidden_size) / 1e6
    notes = []
    costs: dict[str, int] = {}
    if also:
        config, costs = _several(config, steps, budget, also)
    usual_lr = ref.settings["lr_times_width"] / config.model.hidden_size
    # What the reference is not about: other rates, batches and vocabularies shift the loss by an unknown amount.
    for name, value, usual in (
        ("batch.size x sequence_length", tokens_per_step, ref.settings["tokens_per_step"]),
        ("vocabulary", corpus.vocab_size, ref.settings["vocab_size"]),
        ("optimizer.lr", config.optimizer.options.get("lr"), usual_lr),
    ):
        if value != usual:
            notes.append(f"{name} is {value}, {usual:g} in the runs behind the predicted loss: its interval is a guess")
    if config.optimizer.name != "adamw":
        notes.append(f"the runs behind the predicted loss used adamw, not {config.optimizer.name}")
    outside = "" if config.model.from_ else ref.outside(body, tokens)
    if outside:
        notes.append(f"the predicted loss is extrapolated: {outside}")

    losses = ref.losses(max(body, 1e-3), rates_of(config, steps), tokens_per_step)
    ratio, known = _ratio(ref, pilot, body)
    losses = losses * ratio
    doubt = 2 * math.hypot(ref.spread, 0.01 if known else 0.05) + 0.5 * abs(math.log(ratio)) + 0.03 * len(notes)
    shown = [step for step in _checkpoints(steps) if math.isfinite(losses[step - 1])]
    if config.model.from_:
        shown = []
        notes.append("the loss of a model that is given is not predicted: the reference runs start from nothing")
    values = [float(losses[step - 1]) for step in shown]
    if not values and not config.model.from_:
        notes.append(
            f"the loss is not predicted: the run ends at {tokens / 1e6:.2g} M tokens, the reference runs are told from "
            f"{ref.limits['S1'][0]:.2g} M on"
        )
    epochs = tokens / corpus.train_tokens
    schedule = get(config.schedule.name, "schedule")
    figures = [
        *figures,
        Figure(
            "batch",
            f"{config.batch.size} x {corpus.sequence_length} = {tokens_per_step:,} tokens",
            "that of the reference runs" if tokens_per_step == ref.settings["tokens_per_step"] else "as asked for",
            "[batch] size",
        ),
        Figure(
            "learning rate",
            f"{config.optimizer.options.get('lr', '-')} ({config.optimizer.name})",
            "0.256 / width, the peak of the reference runs"
            if config.optimizer.options.get("lr") == usual_lr
            else "as asked for",
            "benchmarks/plan_reference.py",
        ),
        Figure(
            "schedule",
            f"{config.schedule.name}, warm-up {config.schedule.options.get('warmup_steps', 0)}",
            "one run for several budgets: decays before each" if also else schedule.summary,
            f"arXiv {schedule.arxiv}" if schedule.arxiv else "[schedule]",
        ),
        Figure(
            "steps",
            f"{steps:,} ({tokens:,} tokens, {epochs:.2f} epochs)",
            f"{pilot.step_seconds:.3f} s each fill {budget}" if budget.seconds else f"what {budget} come to",
            "trial run",
        ),
        Figure(
            "time",
            f"{seconds / 60:.1f} min",
            f"{steps:,} steps, {EVALUATIONS + 1} evaluations of {pilot.evaluation_seconds:.2f} s, "
            f"{seconds - steps * pilot.step_seconds - (EVALUATIONS + 1) * pilot.evaluation_seconds:.0f} s around them",
            "trial run",
        ),
        Figure("memory", f"{memory / 1024:.2f} GB per worker", "peak of the second trial run", "trial run"),
    ]
    if values:
        figures.append(
            Figure(
                "validation loss",
                f"{values[-1]:.3f} ({values[-1] * math.exp(-doubt):.3f} to {values[-1] * math.exp(doubt):.3f})",
                f"reference curve times {ratio:.3f}, the ratio of early losses",
                "reference.json; arXiv 2408.11029",
            )
        )
    if tokens > corpus.train_tokens:
        notes.append(
            f"the text has {corpus.train_tokens:,} tokens and is read {epochs:.1f} times: "
            "fresh text would serve better (arXiv 1906.06669)"
        )
    section = {
        "total_steps": steps,
        "seconds": round(seconds, 1),
        "memory_mb": round(memory, 1),
        "steps": shown,
        "losses": [round(value, 4) for value in values],
        "lower": [round(value * math.exp(-doubt), 4) for value in values],
        "upper": [round(value * math.exp(doubt), 4) for value in values],
    }
    config = parse(config.to_toml(), [f"plan.{key}={value}" for key, value in section.items()])
    plan = config.plan
    return Plan(
        config=config,
        machine=machine,
        figures=tuple(figures),
        total_steps=steps,
        tokens=tokens,
        seconds=seconds,
        memory_mb=memory,
        steps=plan.steps,
        losses=plan.losses,
        lower=plan.lower,
        upper=plan.upper,
        notes=tuple(notes),
        also=costs,
    )


def _several(config: Config, steps: int, budget: Budget, also: Sequence[Budget]) -> tuple[Config, dict[str, int]]:
    """One WSD-S run that has a model ready at every budget, and what that costs in steps against other ways."""
    points = sorted({max(1, round(steps * _amount(smaller) / _amount(budget))) for smaller in also} | {steps})
    planner = DecayBranchPlanner(points)
    costs = {mode: planner.total_steps(mode) for mode in ("separate", "wsd", "wsd-s")}
    return with_schedule(config, "wsd-s", checkpoints=points, warmup_steps=min(20, points[0] // 10)), costs


def _ratio(ref: Reference, pilot: Probe, body: float) -> tuple[float, bool]:
    """The trial run's early loss over the reference's at the same steps, and if enough steps were run to tell."""
    first, last = COMPARED
    if len(pilot.losses) < last:
        return 1.0, False
    return float(np.mean(pilot.losses[first:last])) / ref.early_loss(body), True


def _checkpoints(steps: int) -> list[int]:
    """Some forty steps at which the curve is told, the last one included."""
    return sorted({max(1, round(steps * part / 40)) for part in range(1, 41)})


def _unit(budget: Budget) -> str:
    return "steps" if budget.steps else "tokens" if budget.tokens else "seconds"


def _amount(budget: Budget) -> float:
    return budget.steps or budget.tokens or budget.seconds
