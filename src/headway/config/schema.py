"""The sections of a training configuration and their accepted values."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headway.spending import Budget

__all__ = ["SECTIONS", "Config", "MethodSection"]

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
# What a schedule counts on until the steps of a budget of time have been timed.
NOMINAL_STEPS = 10_000

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the file: unknown keys are refused, values are not converted between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    @classmethod
    def keys(cls) -> list[str]:
        """The keys a user may write."""
        return [info.alias or name for name, info in cls.model_fields.items()]


class MethodSection(Section):
    """A method named by slug; the other keys go to its constructor.

    `defaults` are the options of this program's own choice for the method that is named when the
    user names none; a method that the user names starts from its constructor's defaults.
    """

    model_config = ConfigDict(extra="allow")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's keyword arguments."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        name = raw["name"] if "name" in raw else next(iter(cls.defaults))
        chosen = cls.defaults.get(name, {}) if isinstance(name, str) else {}
        return {"name": name, **chosen, **raw}


class OptimizerSection(MethodSection):
    """`[optimizer]`: any slug of role optimizer, or a baseline."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # beta_2 = 0.95 and decay 0.1 are the usual choice for small causal language models.
        "adamw": {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    }


class ScheduleSection(MethodSection):
    """`[schedule]`: any slug of role schedule, or a baseline."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"rex": {}}


class DataSection(Section):
    """`[data]`: where the text comes from and how it is cut."""

    source: str = "stdlib"
    text_field: str = "text"
    tokenizer: str = "train"
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = 2048
    sequence_length: Annotated[int, Field(ge=2)] = 256
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    cache_dir: str = ""


class ModelSection(Section):
    """`[model]`: the sizes of a Llama, or `from` a local folder or hub id."""

    from_: Annotated[str, Field(alias="from")] = ""
    hidden_size: Count = 192
    intermediate_size: Count = 512
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 4
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _divisible(self) -> ModelSection:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"model.hidden_size must be an even multiple of model.heads ({self.heads}), got {self.hidden_size}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        return self


class BatchSection(MethodSection):
    """`[batch]`: sequences per optimizer step over all workers, per forward pass on one of them, and how the
    former grows: any slug of role batch schedule, or a baseline.
    """

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"fixed": {}}

    size: Count = 8
    micro_batch: CountOrZero = 0  # 0: the worker's whole share at once


class TrainSection(Section):
    """`[train]`: the loop itself."""

    steps: Annotated[int, Field(ge=0)] = 320
    budget: str = ""  # instead of steps
    seed: CountOrZero = 0
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # 0: no clipping
    evaluate_every: CountOrZero = 80  # 0: only at the end
    evaluate_batches: Count = 16
    log_every: Count = 10
    on_nonfinite: Literal["stop", "skip"] = "stop"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: CountOrZero = 0  # 0: the machine's cores shared by the workers on it

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("budget"):
            return {"steps": 0, **raw, "budget": str(raw["budget"])}
        return raw

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            try:
                Budget.parse(value)
            except ValueError as error:
                raise ValueError(f"train.budget: {error}") from error
        return value

    @model_validator(mode="after")
    def _enough(self) -> TrainSection:
        if self.budget and self.steps:
            raise ValueError(f"train.steps must be left out beside train.budget = {self.budget!r}, got {self.steps}")
        if not self.budget and not self.steps:
            raise ValueError("train.steps must be >= 1, got 0")
        return self


class CheckpointSection(Section):
    """`[checkpoint]`: how often, how many are kept, and whether a failed save ends the run."""

    every: CountOrZero = 80  # 0: only at the end and on interruption
    keep: Count = 2
    on_error: Literal["warn", "stop"] = "warn"


class LaunchSection(Section):
    """`[launch]`: processes on this machine, and restarts after a worker's crash."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 0


class SampleSection(Section):
    """`[sample]`: the text written at the end."""

    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    tokens: CountOrZero = 120
    temperature: PositiveFloat = 0.8

    @model_validator(mode="before")
    @classmethod
    def _tuple(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("prompts"), list):
            return {**raw, "prompts": tuple(raw["prompts"])}
        return raw


class PlanSection(Section):
    """`[plan]`: what `headway plan` predicted for this run; read by `headway plan --check`, not by the training."""

    total_steps: CountOrZero = 0  # 0: there is no plan
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    memory_mb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        return raw


class Config(Section):
    """A whole training configuration."""

    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection.model_validate({}))
    schedule: ScheduleSection = Field(default_factory=lambda: ScheduleSection.model_validate({}))
    batch: BatchSection = Field(default_factory=lambda: BatchSection.model_validate({}))
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    plan: PlanSection = Field(default_factory=PlanSection)

    @model_validator(mode="before")
    @classmethod
    def _warm_up(cls, raw: Any) -> Any:
        """The schedule that nobody chose warms up over a tenth of the run, at most 20 steps."""
        if not isinstance(raw, dict) or not isinstance(raw.get("schedule", {}), dict):
            return raw
        schedule, train = raw.get("schedule", {}), raw.get("train", {})
        if not isinstance(train, dict) or "name" in schedule or "warmup_steps" in schedule:
            return raw
        steps = train.get("steps", TrainSection.model_fields["steps"].default)
        if train.get("budget"):
            with contextlib.suppress(pydantic.ValidationError, ValueError):  # told later, where it belongs
                parts = {name: raw[name] for name in ("data", "batch") if name in raw}
                steps = cls.model_validate({**parts, "train": train, "schedule": {"name": "constant"}}).nominal_steps
        if not isinstance(steps, int):
            return raw
        return {**raw, "schedule": {"warmup_steps": max(0, min(20, steps // 10)), **schedule}}

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        share, rest = divmod(self.batch.size, self.launch.workers)
        if rest:
            raise ValueError(
                f"batch.size must be a multiple of launch.workers ({self.launch.workers}), got {self.batch.size}"
            )
        if self.batch.micro_batch and share % self.batch.micro_batch:
            raise ValueError(
                f"batch.micro_batch must divide a worker's share of the batch ({share}), got {self.batch.micro_batch}"
            )
        self._check_checkpoints()
        if self.launch.workers > (os.cpu_count() or 1) * 8:
            raise ValueError(f"launch.workers must be <= 8 per core of this machine, got {self.launch.workers}")
        return self

    def _check_checkpoints(self) -> None:
        """A schedule with checkpoints decays to the last of them, so that must be the end of the run."""
        try:
            steps = self.nominal_steps
        except ValueError as error:
            raise ValueError(f"train.budget: {error}") from error
        points = self.schedule.options.get("checkpoints")
        if not isinstance(points, list | tuple) or not points or not isinstance(points[-1], int):
            return
        if self.budget.seconds:
            raise ValueError(f"schedule.checkpoints must be left out beside a budget of time, got {list(points)}")
        if points[-1] != steps:
            raise ValueError(
                f"schedule.checkpoints must end with the last step of the run ({steps}), got {list(points)}"
            )

    @property
    def budget(self) -> Budget:
        """What the run may spend, with what a step of the first batch size costs."""
        train = self.train
        budget = Budget.parse(train.budget) if train.budget else Budget(steps=train.steps)
        return replace(budget, tokens_per_step=self.batch.size * self.data.sequence_length)

    @property
    def nominal_steps(self) -> int:
        """The budget in steps as far as it is known before the first one; `NOMINAL_STEPS` for a budget of time."""
        return NOMINAL_STEPS if self.budget.seconds else self.budget.total_steps

    def to_toml(self) -> str:
        """The resolved configuration as TOML; loading it gives an equal `Config`."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(by_alias=True, mode="python"))


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
