r"""Kinetics: what test-time scaling costs when reading the KV cache is counted, and the plan that follows.

    eFLOPs = compute + I * memory,    I = FLOP per byte of the device

    dense:   compute = N [2 P L + 2 (2 L_in + L) L D_q]        memory = 2 (2 L_in + N L) L D_kv
    sparse:  compute = N [2 P L + 4 S D_q]                     memory = 4 N S D_kv

for N trials of L generated tokens after a shared prompt of L_in, P active parameters, and D_q, D_kv the query
and KV heads times their dimension times the layers. S is the number of positions read in L steps when each reads
at most K. `sparse_decode_mask` is the selection itself; attaching it to a model (`attach_sparse_attention`) comes
with the serving engine.

Source: "Kinetics: Rethinking Test-Time Scaling Laws", Sadhukhan, Chen, Zheng, Zhou, Strubell, Chen, arXiv 2506.05333.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headway.constraints import Constraint, Range, check_arguments

__all__ = [
    "BlockTopK",
    "Cost",
    "Dense",
    "KineticsCostModel",
    "ModelSpec",
    "Policy",
    "TopK",
    "device_intensity",
    "sparse_decode_mask",
]

_COUNT = Range(low=0, integer=True)
_POSITIVE_COUNT = Range(low=1, integer=True)
_POSITIVE = Range(low=0, low_open=True)

# Published peak rates of the vendors: dense FLOP/s and bytes/s of one accelerator.
DEVICES: dict[str, tuple[float, float]] = {
    "b200-fp8": (4500e12, 8e12),
    "h200-bf16": (989e12, 4.8e12),
    "h100-sxm-bf16": (989e12, 3.35e12),
    "a100-80gb-bf16": (312e12, 2.039e12),
}


@dataclass(frozen=True)
class Dense:
    """Every decode step attends to the whole cache."""


@dataclass(frozen=True)
class TopK:
    """Each step attends to the last `local` positions and the best `budget - local` others.

    The best are found by their true logits, which needs all keys: an oracle that the cost model charges nothing
    for. `BlockTopK` is the deployable policy.

    Args:
        budget: K >= 1 positions per step. The paper sweeps 128 ... 2048.
        local: of these, the newest, in [0, budget]. Default 0, as in the authors' plans.
        sink: first positions kept on top of the budget; costs leave them out, as the authors' do. Default 4.

    Raises:
        ValueError: for an argument out of its range.

    >>> TopK(512, local=64).topk
    448
    """

    budget: int
    local: int = 0
    sink: int = 4

    block_size: ClassVar[int] = 1
    constraints: ClassVar[Mapping[str, Constraint]] = {"budget": _POSITIVE_COUNT, "local": _COUNT, "sink": _COUNT}

    def __post_init__(self) -> None:
        check_arguments(self.constraints, **asdict(self))
        if self.local > self.budget:
            raise ValueError(f"local must be <= budget = {self.budget}, got {self.local}")

    @property
    def topk(self) -> int:
        """The number of positions chosen by their logits."""
        return self.budget - self.local


@dataclass(frozen=True)
class BlockTopK:
    """Each step attends to the last `local` positions and the `topk` best blocks of `block_size` positions.

    A block is scored by its mean key, so one pooled key per block is read to find them.

    Args:
        local: newest positions kept, >= 0; selection adds those that do not fill a block.
        block_size: positions per block, >= 1. The authors' kernels take 16, their plans 16384 // budget.
        topk: blocks chosen, >= 1.
        sink: first positions kept on top of the budget; costs leave them out, as the authors' do. Default 4.

    Raises:
        ValueError: for an argument out of its range.

    >>> BlockTopK.for_budget(512)
    BlockTopK(local=0, block_size=32, topk=16, sink=4)
    """

    local: int
    block_size: int
    topk: int
    sink: int = 4

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "local": _COUNT,
        "block_size": _POSITIVE_COUNT,
        "topk": _POSITIVE_COUNT,
        "sink": _COUNT,
    }

    def __post_init__(self) -> None:
        check_arguments(self.constraints, **asdict(self))

    @classmethod
    def for_budget(cls, budget: int) -> BlockTopK:
        """The authors' choice for `budget` in [128, 16384] positions: blocks of 16384 // budget, no local part."""
        check_arguments({"budget": Range(low=128, high=16384, integer=True)}, budget=budget)
        block_size = 16384 // budget
        return cls(local=0, block_size=block_size, topk=budget // block_size)

    @property
    def budget(self) -> int:
        """K = local + block_size topk, the positions read per step."""
        return self.local + self.block_size * self.topk


Policy = Dense | TopK | BlockTopK
_DENSE = Dense()


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a decoder-only model that its cost depends on.

    Args:
        name: what plans call it.
        active_parameters: P > 0, those that one token uses: of a mixture of experts, its chosen experts.
        layers: >= 1, with an attention over the whole cache each.
        query_heads: H_q per layer, a multiple of kv_heads.
        kv_heads: H_kv per layer.
        head_dim: d.

    Raises:
        ValueError: for an argument out of its range.

    >>> ModelSpec("Qwen3-0.6B", 0.752e9, layers=28, query_heads=16, kv_heads=8, head_dim=128).kv_width
    28672
    """

    name: str
    active_parameters: float
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "active_parameters": _POSITIVE,
        "layers": _POSITIVE_COUNT,
        "query_heads": _POSITIVE_COUNT,
        "kv_heads": _POSITIVE_COUNT,
        "head_dim": _POSITIVE_COUNT,
    }

    def __post_init__(self) -> None:
        check_arguments(self.constraints, **asdict(self))
        _check_heads(self.query_heads, self.kv_heads)

    @property
    def query_width(self) -> int:
        """D_q = H_q d layers."""
        return self.query_heads * self.head_dim * self.layers

    @property
    def kv_width(self) -> int:
        """D_kv = H_kv d layers."""
        return self.kv_heads * self.head_dim * self.layers

    @classmethod
    def from_config(cls, config: Any, n_params: float | None = None, name: str | None = None) -> ModelSpec:
        """The sizes of a transformers configuration, dense or mixture of experts.

        Args:
            config: a causal language model's configuration.
            n_params: active parameters. Default: counted in a model without storage, embedding included (tied
                weights once) and of routed experts the share that a token is sent to.
            name: default the configuration's `name_or_path`, else its `model_type`.

        Raises:
            ValueError: the cache is no plain one (encoder, latent or linear attention, sliding windows), so the
                formulas do not hold.

        >>> from transformers import Qwen3Config
        >>> config = Qwen3Config(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
        >>> ModelSpec.from_config(config, n_params=0.752e9).query_width
        57344
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        _check_plain_cache(text)
        heads = text.num_attention_heads
        return cls(
            name=name or getattr(config, "name_or_path", "") or text.model_type,
            active_parameters=_active_parameters(text) if n_params is None else n_params,
            layers=text.num_hidden_layers,
            query_heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


def _check_heads(query_heads: int, kv_heads: int) -> None:
    if query_heads % kv_heads:
        raise ValueError(f"query_heads must be a multiple of kv_heads = {kv_heads}, got {query_heads}")


def _check_plain_cache(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    other = {
        "an encoder": getattr(config, "is_encoder_decoder", False),
        "latent attention": getattr(config, "kv_lora_rank", None),
        "sliding windows": not kinds and getattr(config, "sliding_window", None),
        f"layers of {sorted(kinds)}": kinds - {"full_attention"},
    }
    for what, present in other.items():
        if present:
            raise ValueError(
                f"config must be of a decoder whose layers all keep the whole cache, got {what}: "
                "build ModelSpec from the sizes of those that do"
            )


def _active_parameters(config: Any) -> float:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {True: 0, False: 0}  # of routed experts or not; the iterator gives tied weights once
    for name, parameter in model.named_parameters():
        sizes[".experts." in name] += parameter.numel()
    if not sizes[True]:
        return float(sizes[False])
    experts = next(
        count
        for key in ("num_local_experts", "num_experts", "n_routed_experts")
        if (count := getattr(config, key, None)) is not None
    )
    return sizes[False] + sizes[True] * config.num_experts_per_tok / experts


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes of memory traffic, and both as equivalent FLOPs. Compare eFLOPs of one intensity only."""

    compute_flops: float
    memory_bytes: float
    eflops: float


class KineticsCostModel:
    r"""The cost of N trials of L generated tokens each, in FLOPs, bytes and equivalent FLOPs.

        eFLOPs = compute + I * memory
        dense:      compute = N [2 P L + 2 (2 L_in + L) L D_q]
                    memory  = b (2 L_in + N L) L D_kv
        TopK:       compute = N [2 P L + 4 S D_q],    memory = 2 b N S D_kv,    S = sum_t min(K, L_in + t + 1/2)
        BlockTopK:  compute + N ((2 L_in + L) // block_size) L D_q,  memory + b/2 ((2 L_in + N L) // block_size) L D_kv

    b is `kv_bytes`. Dense trials read the prompt's cache together, sparse ones choose different positions of it.
    A block policy pays for its search at every step, also where K covers the whole cache.

    Args:
        intensity: I >= 0, FLOP per byte; 0 leaves FLOPs. Default 562.5, the authors' choice: 4500 TFLOP/s over
            8 TB/s, a B200's peak rates in 8 bits. See `device_intensity`.
        kv_bytes: bytes per number in the cache, > 0: 2 for 16 bits (default), 1 for fp8, 0.5 for int4.
        include_weights: add 2 P L / batch bytes, 16-bit weights read once per step for a whole batch. Default False,
            as in the paper, which assumes large batches.
        batch: requests decoded together, >= 1, for `include_weights`. Default 1.
        official_sign: parity with the authors' code for TopK. Default False.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2506.05333. Departures: S = K L - (K - L_in)^2 / 2 for L_in <= K <= L_in + L, and the dense sum above;
    the authors' code adds the square for TopK (`official_sign=True`), and goes on subtracting beyond
    L_in + L for BlockTopK. Costs are in FLOPs and bytes, not in 1e12 of them.

    >>> spec = ModelSpec("Qwen3-0.6B", 0.752e9, layers=28, query_heads=16, kv_heads=8, head_dim=128)
    >>> cost = KineticsCostModel().cost(spec, prompt=256, generated=32768)
    >>> round(562.5 * cost.memory_bytes / 1e12), round(cost.compute_flops / 1e12)
    (35176, 174)
    >>> sparse = KineticsCostModel().cost(spec, prompt=256, generated=32768, policy=TopK(512))
    >>> round(cost.eflops / sparse.eflops)
    31
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "intensity": Range(low=0),
        "kv_bytes": _POSITIVE,
        "batch": _POSITIVE_COUNT,
    }

    def __init__(
        self,
        intensity: float = 562.5,
        kv_bytes: float = 2,
        include_weights: bool = False,
        *,
        batch: int = 1,
        official_sign: bool = False,
    ) -> None:
        check_arguments(self.constraints, intensity=intensity, kv_bytes=kv_bytes, batch=batch)
        self.intensity = intensity
        self.kv_bytes = kv_bytes
        self.include_weights = include_weights
        self.batch = batch
        self.official_sign = official_sign

    def cost(self, spec: ModelSpec, prompt: int, generated: int, trials: int = 1, policy: Policy = _DENSE) -> Cost:
        """The cost of one request.

        Args:
            spec: the model.
            prompt: L_in >= 0 tokens.
            generated: L >= 1 tokens per trial. The cost is quadratic: average costs, not lengths.
            trials: N >= 1.
            policy: what a decode step attends to. Default `Dense()`.

        Raises:
            ValueError: for an argument out of its range.
        """
        check_arguments(
            {"prompt": _COUNT, "generated": _POSITIVE_COUNT, "trials": _POSITIVE_COUNT},
            prompt=prompt,
            generated=generated,
            trials=trials,
        )
        return self._cost(spec, prompt, generated, trials, policy)

    def _cost(self, spec: ModelSpec, prompt: int, generated: int, trials: int, policy: Policy) -> Cost:
        weights = 2 * spec.active_parameters * generated
        if isinstance(policy, Dense):
            positions = (2 * prompt + generated) * generated / 2
            read = (2 * prompt + trials * generated) * generated / 2
        else:
            positions = self._positions(policy, prompt, generated)
            read = trials * positions
        compute = trials * (weights + 4 * positions * spec.query_width)
        memory = 2 * self.kv_bytes * read * spec.kv_width
        if isinstance(policy, BlockTopK):
            compute += trials * ((2 * prompt + generated) // policy.block_size) * generated * spec.query_width
            pooled = ((2 * prompt + trials * generated) // policy.block_size) * generated
            memory += self.kv_bytes / 2 * pooled * spec.kv_width
        if self.include_weights:
            memory += weights / self.batch
        return Cost(compute, memory, compute + self.intensity * memory)

    def _positions(self, policy: TopK | BlockTopK, prompt: int, generated: int) -> float:
        budget = policy.budget
        if self.official_sign and isinstance(policy, TopK):
            return budget * generated + 0.5 * max(0, budget - prompt) ** 2
        growing = min(max(0, budget - prompt), generated)  # steps at which the budget covers the whole cache
        return budget * generated - growing * (budget - prompt) + growing**2 / 2


def device_intensity(device: str | tuple[float, float] = "auto") -> float:
    """FLOP per byte of memory traffic: the I of `KineticsCostModel`.

    Args:
        device: (FLOP/s, bytes/s), both > 0; "b200-fp8", "h200-bf16", "h100-sxm-bf16" or "a100-80gb-bf16", for their
            published peak rates; or "auto" (default), which measures a 32-bit matrix product and a copy on this host's
            processor, in well under two seconds.

    Raises:
        ValueError: an unknown name or a rate that is not > 0.

    >>> device_intensity("b200-fp8")
    562.5
    >>> device_intensity((312e12, 2.0e12))
    156.0
    """
    if device == "auto":
        device = _host_rates()
    elif isinstance(device, str):
        if device not in DEVICES:
            raise ValueError(f"device must be 'auto', one of {', '.join(DEVICES)} or two rates, got {device!r}")
        device = DEVICES[device]
    check_arguments({"device": Range(low=0, low_open=True, length=2)}, device=device)
    flops, bandwidth = device
    return flops / bandwidth


def _host_rates(size: int = 512, copied: int = 2**24, repeats: int = 7) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s (read and written) of a copy of `copied` numbers, best of `repeats`."""
    matrix = torch.ones(size, size, device="cpu")
    product = torch.empty_like(matrix)
    source = torch.ones(copied, device="cpu")
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)  # the first, in fresh memory, is never the best

    with torch.inference_mode():
        flops = 2 * size**3 / seconds(lambda: torch.mm(matrix, matrix, out=product))
        bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    return flops, bandwidth


def sparse_decode_mask(logits: Tensor, lengths: Tensor, policy: Policy, num_kv_heads: int) -> Tensor:
    r"""Which positions of the cache one decode step attends to, for each sequence and head.

    With T a sequence's length, kept are the first `sink` and the last `local` positions; all if
    T <= sink + local + topk * block_size; otherwise, of the middle, the `topk` best blocks by

        score(block) = mean over its positions and over the query heads of a group of the logits,

    the same for all heads of a group. Blocks start after the sink, and positions that do not fill one join the local
    part. `TopK` has blocks of one position. No loop over sequences, no host synchronisation.

    Args:
        logits: (B, H_q, T_max), before the softmax; 16-bit ones are averaged in 32 bits. Values from a sequence's
            length on are ignored.
        lengths: (B,), whole numbers in [0, T_max].
        policy: `Dense`, `TopK` or `BlockTopK`.
        num_kv_heads: H_kv, divides H_q; heads of one group are adjacent.

    Returns:
        Bool (B, H_q, T_max), True where attended. Keep the first layer dense, as the authors do.

    Raises:
        ValueError: for shapes that do not fit.

    Source: arXiv 2506.05333, and the rule of the authors' serving code.

    >>> logits = torch.tensor([[[0.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.0]]])
    >>> sparse_decode_mask(logits, torch.tensor([7]), TopK(3, local=1, sink=1), num_kv_heads=1).int().tolist()
    [[[1, 0, 1, 0, 1, 0, 1]]]
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must have the shape (sequences, query heads, positions), got {tuple(logits.shape)}")
    sequences, heads, positions = logits.shape
    if lengths.shape != (sequences,) or lengths.is_floating_point():
        raise ValueError(
            f"lengths must be {sequences} whole numbers, got shape {tuple(lengths.shape)}, {lengths.dtype}"
        )
    check_arguments({"num_kv_heads": _POSITIVE_COUNT}, num_kv_heads=num_kv_heads)
    _check_heads(heads, num_kv_heads)

    length = lengths.to(logits.device).view(-1, 1, 1)
    position = torch.arange(positions, device=logits.device)
    attended = position < length  # (B, 1, T)
    if isinstance(policy, Dense):
        return attended.expand(-1, heads, -1)
    sink, size = policy.sink, policy.block_size
    blocks = max(0, -(-(positions - sink) // size))  # the last may lack positions, and is then never in the middle
    if blocks <= policy.topk:
        return attended.expand(-1, heads, -1)

    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(1, (num_kv_heads, -1)).mean(2)
    scores = torch.nn.functional.pad(scores[..., sink:], (0, sink + blocks * size - positions))
    scores = scores.unflatten(-1, (blocks, size)).mean(-1)  # (B, H_kv, blocks)
    whole = (length - sink - policy.local) // size  # blocks of the middle
    middle = torch.arange(blocks, device=logits.device) < whole
    # Positions masked by the caller stay ahead of what lies outside the middle.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~middle, -math.inf)
    best = scores.topk(policy.topk, dim=-1, sorted=False).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    chosen |= ~middle | (length <= sink + policy.local + policy.topk * size)
    chosen = chosen.repeat_interleave(size, dim=-1)[..., : positions - sink]
    kept = torch.nn.functional.pad(chosen, (sink, 0), value=True) & attended  # (B, H_kv, T)
    return kept.repeat_interleave(heads // num_kv_heads, dim=1)
