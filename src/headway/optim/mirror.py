"""Mirror maps, projections and proximal steps: the geometry of mirror-descent methods.

A mirror map psi turns a point x into a dual point z = grad psi(x), where gradients are subtracted, and back:

    x+ = inverse(grad(x) - eta g) = argmin_y <g, y> + D(y, x) / eta,
    D(y, x) = psi(y) - psi(x) - <grad(x), y - x>

The maps are `Euclidean`, `Entropy`, `UnnormalisedEntropy` and `PowerMap`; the sets to project on are `Ball`, `Box` and
`Simplex`. What ends in an underscore works in place on the tensors of a block, which stand for one long vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from headway.constraints import Range, check_arguments

__all__ = [
    "Ball",
    "Box",
    "Entropy",
    "Euclidean",
    "MirrorMap",
    "PowerMap",
    "Simplex",
    "UnnormalisedEntropy",
    "block_norm",
    "project_ball_",
    "project_ball_in_norm",
    "project_simplex",
    "soft_threshold_",
]


@runtime_checkable
class MirrorMap(Protocol):
    """A mirror map on single tensors; the dual point has the shape of the point."""

    def grad(self, x: Tensor) -> Tensor:
        """The dual point of x, the gradient of psi."""
        ...

    def inverse(self, z: Tensor) -> Tensor:
        """The point whose dual point is z, up to what the domain makes irrelevant."""
        ...

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """The Bregman divergence D(x, y), a scalar >= 0."""
        ...


class Euclidean:
    """psi(x) = |x|^2 / 2 on the whole space.

    >>> float(Euclidean().divergence(torch.tensor([3.0, 4.0]), torch.zeros(2)))
    12.5
    """

    def grad(self, x: Tensor) -> Tensor:
        """The point itself."""
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """The dual point itself."""
        return z

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """|x - y|^2 / 2."""
        return (x - y).square().sum() / 2


class UnnormalisedEntropy:
    """psi(x) = sum_i x_i log x_i - x_i on positive tensors: steps multiply, x+ = x exp(-eta g).

    >>> round(float(UnnormalisedEntropy().inverse(torch.tensor(0.0))), 6)
    1.0
    """

    def grad(self, x: Tensor) -> Tensor:
        """The logarithm of x."""
        return x.log()

    def inverse(self, z: Tensor) -> Tensor:
        """The exponential of z."""
        return z.exp()

    def canonical(self, z: Tensor) -> Tensor:
        """The dual point itself: every dual point belongs to one point."""
        return z

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_i x_i log(x_i / y_i) - x_i + y_i, where 0 log 0 = 0."""
        return (torch.xlogy(x, x) - torch.xlogy(x, y) - x + y).sum()


class Entropy(UnnormalisedEntropy):
    """psi(x) = sum_i x_i log x_i on the simplex, one for each row of the last dimension.

    Steps are exponentiated gradient, x+ proportional to x exp(-eta g); a constant added to g changes nothing.

    >>> Entropy().inverse(torch.zeros(2, 4))[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def inverse(self, z: Tensor) -> Tensor:
        """Softmax of each row."""
        return z.softmax(-1)

    def canonical(self, z: Tensor) -> Tensor:
        """The dual point of the same x whose exponentials sum to one: it keeps its precision over many steps."""
        return z.log_softmax(-1)


@dataclass(frozen=True)
class PowerMap:
    r"""psi(x) = (2^(q-2) / q) |x - c|^q with q = p / (p - 1), for gradients that have a p-th moment only.

        grad(x)    = 2^(q-2) |x - c|^(q-2) (x - c)
        inverse(z) = c + (|z| / 2^(q-2))^(1/(q-1)) z / |z|          c where z = 0

    psi is uniformly convex of degree q: D(x, y) >= |x - y|^q / q. p = 2 is the Euclidean map.

    Args:
        p: the moment, in (1, 2].
        center: c, a number or a tensor that broadcasts to the points. Default 0.
        dim: the dimension over which norms are taken, so that e.g. each row (-1) is a point of its own. Default None:
            the whole tensor is one point.

    >>> cube = PowerMap(p=1.5)  # q = 3
    >>> cube.grad(torch.tensor([3.0, 4.0]))
    tensor([30., 40.])
    >>> cube.inverse(torch.tensor([30.0, 40.0]))
    tensor([3., 4.])
    """

    p: float
    center: float | Tensor = 0.0
    dim: int | None = None

    def __post_init__(self) -> None:
        check_arguments({"p": Range(low=1, high=2, low_open=True)}, p=self.p)

    @property
    def q(self) -> float:
        """The conjugate exponent p / (p - 1) >= 2."""
        return self.p / (self.p - 1)

    def grad_factor(self, norm: Tensor) -> Tensor:
        """What x - c is multiplied with, where `norm` = |x - c|."""
        return 2 ** (self.q - 2) * norm ** (self.q - 2)

    def inverse_factor(self, norm: Tensor) -> Tensor:
        """What z is multiplied with, where `norm` = |z|."""
        length = (norm / 2 ** (self.q - 2)) ** (1 / (self.q - 1))
        return torch.where(norm > 0, length / norm, 0.0)

    def grad(self, x: Tensor) -> Tensor:
        """The dual point of x."""
        offset = x - self.center
        return offset * self.grad_factor(self._norm(offset))

    def inverse(self, z: Tensor) -> Tensor:
        """The point of z."""
        return self.center + z * self.inverse_factor(self._norm(z))

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """The Bregman divergence of the map."""
        scale = 2 ** (self.q - 2) / self.q
        psi_x, psi_y = (scale * (self._norm(point - self.center) ** self.q).sum() for point in (x, y))
        return psi_x - psi_y - (self.grad(y) * (x - y)).sum()

    def _norm(self, v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=self.dim, keepdim=self.dim is not None)


@dataclass(frozen=True)
class Ball:
    """The points at most `radius` from `center` (a number or a tensor), for each row of the last dimension.

    >>> Ball(1.0)(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """

    radius: float
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_arguments({"radius": Range(low=0, low_open=True)}, radius=self.radius)

    def __call__(self, v: Tensor) -> Tensor:
        """The nearest point of the set."""
        norm = torch.linalg.vector_norm(v - self.center, dim=-1, keepdim=True)
        center = self.center if isinstance(self.center, Tensor) else torch.full_like(v, self.center)
        return torch.lerp(center.expand_as(v), v, _shrink(norm, self.radius))


@dataclass(frozen=True)
class Box:
    """The points with all entries in [low, high].

    >>> Box(0.0, 1.0)(torch.tensor([-2.0, 0.5, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low must be <= high, got {self.low!r} and {self.high!r}")

    def __call__(self, v: Tensor) -> Tensor:
        """The nearest point of the set."""
        return v.clamp(self.low, self.high)


@dataclass(frozen=True)
class Simplex:
    """The points with entries >= 0 that sum to one, for each row of the last dimension.

    >>> Simplex()(torch.tensor([0.9, 0.5, -1.0]))
    tensor([0.7000, 0.3000, 0.0000])
    """

    def __call__(self, v: Tensor) -> Tensor:
        """The nearest point of the set."""
        return project_simplex(v)


def project_simplex(v: Tensor) -> Tensor:
    """The nearest point of the simplex to each row of the last dimension, by sorting.

    >>> project_simplex(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if v.ndim == 0:
        return torch.ones_like(v)
    descending = v.sort(dim=-1, descending=True).values
    counts = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    excess = descending.cumsum(-1) - 1
    support = (descending * counts > excess).sum(-1, keepdim=True)
    return (v - excess.gather(-1, support - 1) / support).clamp_min(0)


def project_ball_in_norm(H: Tensor, v: Tensor, radius: float | Tensor, center: float | Tensor = 0.0) -> Tensor:
    r"""argmin_x (x - v)^T H (x - v) over |x - c| <= radius.

    Outside the ball x = c + (H + mu I)^-1 H (v - c), with the mu > 0 that puts x on the sphere, by bisection.

    Args:
        H: a symmetric positive definite matrix, shape (d, d).
        v: shape (d,).
        radius: of the ball, > 0.
        center: c, a number or a tensor of shape (d,).

    >>> project_ball_in_norm(torch.diag(torch.tensor([1.0, 100.0])), torch.tensor([2.0, 0.5]), 1.0)
    tensor([0.8697, 0.4936])
    """
    offset = v - center
    if torch.linalg.vector_norm(offset) <= radius:
        return v
    values, vectors = torch.linalg.eigh(H)
    rotated = vectors.T @ offset

    def point(mu: float) -> Tensor:
        return values / (values + mu) * rotated

    low, high = 0.0, float(values[-1]) * float(torch.linalg.vector_norm(offset) / radius)
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if torch.linalg.vector_norm(point(middle)) > radius:
            low = middle
        else:
            high = middle
    return center + vectors @ point(high)


def soft_threshold_(tensors: list[Tensor], threshold: float) -> None:
    """Move every entry towards zero by `threshold` >= 0; those that reach it are exactly zero.

    >>> v = torch.tensor([-3.0, 0.5, 2.0])
    >>> soft_threshold_([v], 1.0)
    >>> v
    tensor([-2.,  0.,  1.])
    """
    moved = torch._foreach_clamp_max(tensors, threshold)
    torch._foreach_clamp_min_(moved, -threshold)
    torch._foreach_sub_(tensors, moved)


def project_ball_(tensors: Sequence[Tensor], centers: Sequence[Tensor], radius: float | Tensor, norm: Tensor) -> None:
    """Project a block on the ball about `centers`; `norm` is the block's distance from them, see `block_norm`.

    >>> v = [torch.tensor([3.0]), torch.tensor([4.0])]
    >>> project_ball_(v, [torch.zeros(1), torch.zeros(1)], 1.0, block_norm(v))
    >>> [round(float(x), 4) for x in v]
    [0.6, 0.8]
    """
    factor = _shrink(norm, radius)
    for v, center in zip(tensors, centers, strict=True):
        v.copy_(torch.lerp(center, v, factor.to(v.device, v.dtype)))


def _shrink(norm: Tensor, radius: float | Tensor) -> Tensor:
    """min(1, radius / norm); with `torch.lerp`, points of the ball stay as they are to the bit."""
    return torch.where(norm > radius, radius / norm, 1.0)


def block_norm(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """The Euclidean norm of a block as a scalar tensor, in float64 where the device has it.

    Args:
        tensors: the block, at least one tensor.
        like: parameters of which `tensors` are this rank's parts: where they are sharded (DTensor), the norm is that
            of the whole, and all ranks have to call this. Default None: `tensors` are whole.

    >>> float(block_norm([torch.tensor([3.0]), torch.tensor(4.0)]))
    5.0
    """
    device = tensors[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    whole: list[Tensor] = []
    sharded: dict[object, list[Tensor]] = {}
    for index, tensor in enumerate(tensors):
        p: Any = None if like is None else like[index]
        if hasattr(p, "placements"):
            from torch.distributed.tensor import DTensor  # here: a second of import time that few runs need

            part = DTensor.from_local(
                tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
            sharded.setdefault(p.device_mesh, []).append(part)
        else:
            whole.append(tensor)
    norms = list(torch._foreach_norm(whole)) if whole else []
    for parts in sharded.values():
        total: Any = get_total_norm(parts)
        norms.append(total.full_tensor())
    return torch.linalg.vector_norm(torch.stack([norm.to(device, dtype) for norm in norms]))
