"""Which model, how many samples and how many tokens: the best coverage that a serving budget buys.

    pass@k = 1 - C(n - c, k) / C(n, k)        n recorded samples of a question, c of them correct

For every budget each question is answered by the configuration (model, trials, length, attention) with the best
coverage among those that cost no more; the frontier is the mean over questions, and its upper envelope over models.

Source: "Kinetics: Rethinking Test-Time Scaling Laws", Sadhukhan, Chen, Zheng, Zhou, Strubell, Chen, arXiv 2506.05333.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from headway.budget.kinetics import Dense, KineticsCostModel, ModelSpec, Policy
from headway.constraints import Range, check_arguments
from headway.plots import Panel

__all__ = ["Configuration", "FrontierPoint", "InferencePlan", "pass_at_k", "plan_inference"]

_COUNT = Range(low=0, integer=True)
_POSITIVE_COUNT = Range(low=1, integer=True)
_POSITIVE = Range(low=0, low_open=True)
_DENSE = Dense()


def pass_at_k(samples: int, correct: int, trials: int) -> float:
    r"""The chance that one of `trials` samples solves a question of which `correct` of `samples` did, unbiased.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Args:
        samples: n >= 1 recorded.
        correct: c in [0, n].
        trials: k in [1, n].

    Raises:
        ValueError: for an argument out of its range.

    >>> pass_at_k(samples=4, correct=1, trials=2)
    0.5
    """
    check_arguments({"samples": _POSITIVE_COUNT}, samples=samples)
    check_arguments(
        {"correct": Range(low=0, high=samples, integer=True), "trials": Range(low=1, high=samples, integer=True)},
        correct=correct,
        trials=trials,
    )
    return 1 - math.comb(samples - correct, trials) / math.comb(samples, trials)


@dataclass(frozen=True)
class Configuration:
    """One way to answer, the same for every question, with its mean coverage and cost over the questions."""

    model: str
    policy: Policy
    trials: int
    max_tokens: int | None
    coverage: float
    eflops: float


@dataclass(frozen=True)
class FrontierPoint:
    """The best model for a budget per question; None where no configuration of any model fits a question."""

    budget: float
    coverage: float
    model: str | None


@dataclass(frozen=True)
class InferencePlan:
    """What `plan_inference` returns: `curves` (model -> coverage at each budget), their envelope, single choices."""

    budgets: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]
    frontier: tuple[FrontierPoint, ...]
    configurations: tuple[Configuration, ...] = field(repr=False)

    def best_config(self, budget: float) -> Configuration:
        """The configuration of highest mean coverage whose mean cost is at most `budget`; the cheapest among equals.

        Raises:
            ValueError: none is that cheap.
        """
        fitting = [c for c in self.configurations if c.eflops <= budget]
        if not fitting:
            cheapest = min(c.eflops for c in self.configurations)
            raise ValueError(f"budget must be >= {cheapest:g}, the cheapest configuration's eFLOPs, got {budget!r}")
        return max(fitting, key=lambda c: (c.coverage, -c.eflops))

    def panels(self) -> list[Panel]:
        """Coverage over budget: per model with their envelope, and of configurations used for all questions."""
        x = list(self.budgets)
        curves: dict[str, tuple[list[float], list[float]]] = {name: (x, list(y)) for name, y in self.curves.items()}
        curves["best of all"] = (x, [point.coverage for point in self.frontier])
        single: dict[str, tuple[list[float], list[float]]] = {}
        for name in self.curves:
            ordered = sorted((c.eflops, c.coverage) for c in self.configurations if c.model == name)
            best = np.maximum.accumulate([coverage for _, coverage in ordered])
            single[name] = ([cost for cost, _ in ordered], best.tolist())
        labels = ("eFLOPs per question", "coverage")
        return [
            Panel("Best configuration of each question", *labels, curves, log_x=True),
            Panel("One configuration for all", *labels, single, log_x=True, styles=dict.fromkeys(single, "points")),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values; policies as their `repr`."""
        return {
            "budgets": list(self.budgets),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
            "frontier": [asdict(point) for point in self.frontier],
            "configurations": [{**asdict(c), "policy": repr(c.policy)} for c in self.configurations],
        }


def plan_inference(
    records: Iterable[Any],
    budgets: Iterable[float],
    *,
    models: Mapping[Any, ModelSpec] | None = None,
    policies: Mapping[Any, Policy] | None = None,
    cost_model: KineticsCostModel | None = None,
    trials: Sequence[int] | None = None,
    max_tokens: Sequence[int | None] = (None,),
) -> InferencePlan:
    r"""Which model, policy, number of trials and length answer best for a budget per question.

        f_m(b) = mean over questions q of  max { pass@N_q(x) : x a configuration of m, cost_q(x) <= b },  0 if none
        frontier(b) = max over m of f_m(b)

    cost_q(x) is the mean over the recorded lengths of the question. f_m chooses per question with its answers known:
    an upper bound, as in the paper's figures. `InferencePlan.best_config` makes one choice for all.

    Args:
        records: one per recorded sample: mappings, objects with attributes, or a DataFrame of `question`, `model`
            (a ModelSpec or a key of `models`), `policy` (a Policy or a key of `policies`), `correct` (0 or 1),
            `generated_tokens` >= 1 and, optionally, `prompt_tokens` (default 0). Each (model, policy) needs samples of
            every question.
        budgets: b > 0 in eFLOPs per question, increasing.
        models: key -> ModelSpec, for records that hold keys.
        policies: key -> Policy, for records that hold keys. Default {"dense": Dense()}.
        cost_model: default `KineticsCostModel()`.
        trials: N to consider, each at most the samples of any question. Default: the powers of two for which each
            (model, policy) has enough.
        max_tokens: lengths to cut generation at, None for none. A sample that is cut counts as wrong. Default (None,).

    Raises:
        ValueError: no records, one that lacks a field or holds a wrong value, a question without samples of some
            (model, policy), budgets not increasing and > 0, or a number of trials beyond the samples.

    Source: arXiv 2506.05333. The authors' plots divide costs by 4500 and smooth over three budgets; this does neither.
    They score cut generations by what they hold; records do not tell, hence the rule of `max_tokens`.

    >>> small = ModelSpec("small", 1e9, layers=16, query_heads=16, kv_heads=8, head_dim=64)
    >>> rows = [
    ...     {"question": q, "model": small, "policy": "dense", "correct": q == i, "generated_tokens": 1000}
    ...     for q in range(2)
    ...     for i in range(2)
    ... ]
    >>> chosen = plan_inference(rows, budgets=[1e12, 1e14]).best_config(1e14)
    >>> chosen.trials, chosen.coverage
    (2, 1.0)
    """
    grid = _budgets(budgets)
    cost_model = cost_model or KineticsCostModel()
    for limit in max_tokens:
        check_arguments({"max_tokens": Range(low=1, integer=True, optional=True)}, max_tokens=limit)
    cells = _cells(records, models or {}, {"dense": _DENSE} if policies is None else policies)

    configurations: list[Configuration] = []
    tables: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for (spec, policy), questions in cells.items():
        fewest = min(len(samples) for samples in questions.values())
        for count in _trials(trials, fewest):
            for limit in max_tokens:
                rows = [_answer(cost_model, spec, policy, count, limit, samples) for samples in questions.values()]
                costs, coverages = np.array(rows).T  # (questions,) each
                tables[spec.name].append((costs, coverages))
                configurations.append(
                    Configuration(spec.name, policy, count, limit, float(coverages.mean()), float(costs.mean()))
                )
    if not configurations:
        raise ValueError(f"trials and max_tokens must hold at least one value each, got {trials!r} and {max_tokens!r}")
    curves: dict[str, tuple[float, ...]] = {}
    for name, table in tables.items():
        costs = np.stack([row[0] for row in table])  # (configurations, questions)
        coverages = np.stack([row[1] for row in table])
        curves[name] = tuple(float(np.where(costs <= b, coverages, 0.0).max(axis=0).mean()) for b in grid)
    frontier = []
    for number, budget in enumerate(grid):
        best = max(curves, key=lambda name: curves[name][number])
        coverage = curves[best][number]
        frontier.append(FrontierPoint(budget, coverage, best if coverage > 0 else None))
    return InferencePlan(grid, curves, tuple(frontier), tuple(configurations))


@dataclass(frozen=True)
class _Sample:
    correct: bool
    prompt: int
    generated: int


_Cells = dict[tuple[ModelSpec, Policy], dict[Hashable, list[_Sample]]]


def _answer(
    cost_model: KineticsCostModel,
    spec: ModelSpec,
    policy: Policy,
    trials: int,
    limit: int | None,
    samples: Sequence[_Sample],
) -> tuple[float, float]:
    """Mean cost and coverage of one question."""
    longest = math.inf if limit is None else limit
    costs = [cost_model._cost(spec, s.prompt, int(min(s.generated, longest)), trials, policy).eflops for s in samples]
    correct = sum(s.correct and s.generated <= longest for s in samples)
    return math.fsum(costs) / len(costs), pass_at_k(len(samples), correct, trials)


def _budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    grid = tuple(float(b) for b in budgets)
    if not grid:
        raise ValueError("budgets must hold at least one, got none")
    for before, budget in zip((0.0, *grid), grid, strict=False):
        if not before < budget < math.inf:
            raise ValueError(f"budgets must be > 0, finite and increasing, got {budget:g} after {before:g}")
    return grid


def _trials(trials: Sequence[int] | None, fewest: int) -> Sequence[int]:
    if trials is None:
        return [2**power for power in range(fewest.bit_length())]
    for count in trials:
        check_arguments({"trials": Range(low=1, high=fewest, integer=True)}, trials=count)
    return trials


def _cells(records: Iterable[Any], models: Mapping[Any, ModelSpec], policies: Mapping[Any, Policy]) -> _Cells:
    """The samples of each (model, policy), cheapest model first, by question."""
    table = getattr(records, "to_dict", None)
    rows = table("records") if callable(table) and not isinstance(records, Mapping) else records
    cells: _Cells = defaultdict(lambda: defaultdict(list))
    names: dict[str, ModelSpec] = {}
    for number, row in enumerate(rows):
        value = _Row(row, number)
        spec = value.resolve("model", ModelSpec, models)
        policy = value.resolve("policy", Policy, policies)
        if names.setdefault(spec.name, spec) != spec:
            raise ValueError(f"records must name different models differently, row {number} repeats {spec.name!r}")
        sample = _Sample(
            correct=bool(value.number("correct", Range(low=0, high=1, integer=True))),
            prompt=value.number("prompt_tokens", _COUNT, 0),
            generated=value.number("generated_tokens", _POSITIVE_COUNT),
        )
        cells[spec, policy][value.get("question")].append(sample)
    if not cells:
        raise ValueError("records must hold at least one row, got none")
    questions = list(dict.fromkeys(question for cell in cells.values() for question in cell))
    for (spec, policy), cell in cells.items():
        for question in questions:
            if question not in cell:
                raise ValueError(
                    f"records must hold every question for every model and policy, "
                    f"{question!r} has none of {spec.name!r} with {policy!r}"
                )
    ordered = sorted(cells.items(), key=lambda item: item[0][0].active_parameters)
    return {key: {question: cell[question] for question in questions} for key, cell in ordered}


class _Row:
    """One record, mapping or object, with messages that name the row."""

    def __init__(self, row: Any, number: int) -> None:
        self.row = row
        self.where = f"row {number}"

    def get(self, name: str, *default: Any) -> Any:
        try:
            return self.row[name] if isinstance(self.row, Mapping) else getattr(self.row, name)
        except (KeyError, AttributeError):
            if default:
                return default[0]
            raise ValueError(f"records must have {name!r}, {self.where} has none") from None

    def number(self, name: str, accepted: Range, *default: int) -> int:
        value = self.get(name, *default)
        value = int(value) if isinstance(value, bool | np.bool_) else value
        where = f"{name} of {self.where}"
        check_arguments({where: accepted}, **{where: value})
        return int(value)

    def resolve(self, name: str, kind: Any, known: Mapping[Any, Any]) -> Any:
        value = self.get(name)
        if isinstance(value, kind):
            return value
        if value not in known:
            keys = ", ".join(repr(key) for key in known) or "none"
            raise ValueError(f"{name} of {self.where} must be an object or a given key ({keys}), got {value!r}")
        return known[value]
