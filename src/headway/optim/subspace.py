"""Subspaces of a weight matrix: where a method keeps optimizer state, or what it masks.

For a gradient G (rows x columns) a subspace maps `g = down(G)` to the small space and `up(g)` back,
with `down(up(g)) = g`; `residual(G) = G - up(down(G))` is what lies outside. Coordinate subspaces
(`columns`, `rows`, `randk`, `randperm`) keep entries, bases (`svd`, `random`) keep directions of the
shorter side. A tensor of more than two dimensions is seen as rows x (all other dimensions).

Everything random comes from `seeded_generator(seed, *counters)`: a draw depends on what is drawn and
when, not on what was drawn before, so that all ranks, and a resumed run, draw the same.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "BLOCK_ORDERS",
    "COORDINATE_PROJECTIONS",
    "TENSOR_PROJECTIONS",
    "Basis",
    "Coordinates",
    "Subspace",
    "active_blocks",
    "as_matrix",
    "draw",
    "reproject",
    "reproject_units",
    "restore",
    "seeded_generator",
    "svd_basis",
]

COORDINATE_PROJECTIONS = ("columns", "randk", "randperm", "rows")
TENSOR_PROJECTIONS = (*COORDINATE_PROJECTIONS, "random", "svd")
BLOCK_ORDERS = ("ascending", "descending", "mirror", "random")


class Subspace(Protocol):
    """A subspace of rows x columns matrices. `tensor` is all there is to save; `restore` is the way back."""

    tensor: Tensor

    def down(self, matrix: Tensor) -> Tensor:
        """The coefficients of `matrix` in the subspace."""
        ...

    def up(self, small: Tensor, shape: torch.Size) -> Tensor:
        """The matrix with coefficients `small`: `merge_` into zeros."""
        ...

    def residual(self, matrix: Tensor, small: Tensor) -> Tensor:
        """`matrix - up(small)` in new memory, where `small = down(matrix)`."""
        ...

    def merge_(self, outside: Tensor, small: Tensor) -> Tensor:
        """`outside`, changed in place to hold `up(small)` too.

        A basis adds; coordinates overwrite, so that `outside` may hold anything on their entries.
        """
        ...

    def is_full(self, shape: torch.Size) -> bool:
        """Whether the subspace is the whole space, so that no residual is left."""
        ...


class Coordinates:
    """The entries at `tensor` (indices): whole columns (axis 1), whole rows (axis 0) or single entries (axis None).

    >>> G = torch.arange(6.0).reshape(2, 3)
    >>> middle = Coordinates(1, torch.tensor([1]))
    >>> middle.down(G)
    tensor([[1.],
            [4.]])
    >>> middle.residual(G, middle.down(G))
    tensor([[0., 0., 2.],
            [3., 0., 5.]])
    """

    def __init__(self, axis: int | None, indices: Tensor) -> None:
        self.axis = axis
        self.tensor = indices

    def down(self, matrix: Tensor) -> Tensor:
        if self.axis == 1:  # on processors, gather along the rows beats index_select by 2x
            return matrix.gather(1, self.tensor.expand(matrix.shape[0], -1))
        if self.axis == 0:
            return matrix.index_select(0, self.tensor)
        return matrix.reshape(-1).index_select(0, self.tensor)

    def up(self, small: Tensor, shape: torch.Size) -> Tensor:
        return self.merge_(small.new_zeros(shape), small)

    def residual(self, matrix: Tensor, small: Tensor) -> Tensor:
        return self.merge_(matrix.clone(memory_format=torch.contiguous_format), torch.zeros_like(small))

    def merge_(self, outside: Tensor, small: Tensor) -> Tensor:
        if self.axis == 1:
            return outside.scatter_(1, self.tensor.expand(outside.shape[0], -1), small)
        if self.axis == 0:
            return outside.index_copy_(0, self.tensor, small)
        outside.view(-1).index_copy_(0, self.tensor.long(), small)
        return outside

    def units(self, matrix: Tensor, fill: float = 0) -> Tensor:
        """One number per column, row or entry of the subspace, in a shape that broadcasts against `down(matrix)`."""
        shape = {1: (1, -1), 0: (-1, 1), None: (-1,)}[self.axis]
        return matrix.new_full((self.tensor.numel(),), fill).view(shape)

    def is_full(self, shape: torch.Size) -> bool:
        return self.tensor.numel() == (shape.numel() if self.axis is None else shape[self.axis])


class Basis:
    """The span of orthonormal vectors: rows of `tensor` (r x columns, right side) or its columns (rows x r, left side).

    >>> G = torch.eye(3)[:2]
    >>> first = Basis("left", torch.tensor([[1.0], [0.0]]))
    >>> first.down(G)
    tensor([[1., 0., 0.]])
    >>> first.residual(G, first.down(G))
    tensor([[0., 0., 0.],
            [0., 1., 0.]])
    """

    def __init__(self, side: str, basis: Tensor) -> None:
        self.side = side
        self.tensor = basis

    def down(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        left, right = (matrix, self.tensor.mT) if self.side == "right" else (self.tensor.mT, matrix)
        return torch.mm(left, right, out=out)

    def up(self, small: Tensor, shape: torch.Size) -> Tensor:
        return small @ self.tensor if self.side == "right" else self.tensor @ small

    def residual(self, matrix: Tensor, small: Tensor) -> Tensor:
        """Entries below 1e-6 of the norm of their row (right side) or column (left side) are set to zero.

        They are rounding noise of the two products; a method that takes their sign would turn the
        noise into full-size steps wherever the gradient lies inside the subspace.
        """
        left, right = (small, self.tensor) if self.side == "right" else (self.tensor, small)
        residual = torch.addmm(matrix, left, right, alpha=-1)
        floor = torch.linalg.vector_norm(matrix, dim=1 if self.side == "right" else 0, keepdim=True).mul_(1e-6)
        return residual.masked_fill_(residual.abs() <= floor, 0)

    def merge_(self, outside: Tensor, small: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        """`beta * outside + alpha * up(small)`, in place of `outside`."""
        left, right = (small, self.tensor) if self.side == "right" else (self.tensor, small)
        return outside.addmm_(left, right, alpha=alpha, beta=beta)

    def is_full(self, shape: torch.Size) -> bool:
        return min(self.tensor.shape) == min(shape)


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as a contiguous rows x columns matrix; a view where that is possible. One row for 0-D and 1-D.

    >>> as_matrix(torch.zeros(4, 3, 2, 2)).shape
    torch.Size([4, 12])
    """
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)
    return matrix.contiguous()


def seeded_generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone; unequal arguments give unrelated streams."""
    digest = hashlib.blake2b(repr((seed, *counters)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draw(projection: str, matrix: Tensor, density: float, generator: torch.Generator) -> Subspace:
    """A new subspace for a gradient `matrix` (rows x columns).

    - `columns`, `rows`, `randk`: `int(density * count)` columns, rows or single entries, uniformly without repetition.
    - `randperm`: `round(density * min(rows, columns))` coordinates of the shorter side; the same projector as
      rows of a permutation matrix.
    - `svd`: the top `round(density * min(rows, columns))` singular directions of the shorter side, the right side
      if rows >= columns. In fp32 for 16-bit gradients.
    - `random`: as many semi-orthogonal random directions.
    """
    rows, columns = matrix.shape
    side, axis = ("right", 1) if rows >= columns else ("left", 0)
    rank = round(density * min(rows, columns))
    if projection == "svd":
        return svd_basis(matrix, rank, side)
    if projection == "random":
        basis = torch.empty((rank, columns) if side == "right" else (rows, rank), device=generator.device)
        if rank:
            torch.nn.init.orthogonal_(basis, generator=generator)
        wide_dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        return Basis(side, basis.to(device=matrix.device, dtype=wide_dtype))
    if projection == "randperm":
        count, total = rank, matrix.shape[axis]
    elif projection in ("columns", "rows"):
        axis = 1 if projection == "columns" else 0
        total = matrix.shape[axis]
        count = int(density * total)
    elif projection == "randk":
        total = matrix.numel()
        count = int(density * total)
    else:
        raise ValueError(f"projection must be one of {', '.join(map(repr, TENSOR_PROJECTIONS))}, got {projection!r}")
    # Ascending order: neighbours in memory stay neighbours, and the state does not care.
    indices = torch.randperm(total, generator=generator, device=generator.device)[:count].sort().values
    if projection == "randk" and total < 2**31:
        indices = indices.to(torch.int32)  # an index per entry is as large as a moment
    return Coordinates(None if projection == "randk" else axis, indices.to(matrix.device))


def svd_basis(matrix: Tensor, rank: int, side: str) -> Basis:
    """The top `rank` singular directions of a matrix: right (rows of V^T) or left (columns of U). fp32 for 16 bits.

    >>> svd_basis(torch.diag(torch.tensor([1.0, 3.0])), 1, "right").tensor.abs()
    tensor([[0., 1.]])
    """
    rows, columns = matrix.shape
    if rank == 0:
        return Basis(side, matrix.new_zeros((0, columns) if side == "right" else (rows, 0)))
    wide = matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
    U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
    basis = Vh[:rank] if side == "right" else U[:, :rank]
    # A slice would keep the whole factor in memory. LAPACK's column order would not survive a checkpoint, and products
    # round differently in another order: a resumed run would not be the same to the bit.
    return Basis(side, basis.clone(memory_format=torch.contiguous_format))


def restore(projection: str, tensor: Tensor, shape: torch.Size) -> Subspace:
    """The subspace that `draw` returned for a matrix of this shape, from its saved `tensor`."""
    side, axis = ("right", 1) if shape[0] >= shape[1] else ("left", 0)
    if projection in ("svd", "random"):
        return Basis(side, tensor)
    return Coordinates({"columns": 1, "rows": 0, "randk": None}.get(projection, axis), tensor)


def reproject(small: Tensor, old: Subspace, new: Subspace, shape: torch.Size) -> Tensor:
    """State moved to a new subspace, `new.down(old.up(small))`: what both share survives, the rest starts at zero."""
    return new.down(old.up(small, shape))


def reproject_units(units: Tensor, old: Coordinates, new: Coordinates, shape: torch.Size) -> Tensor:
    """`reproject` for one number per unit (`Coordinates.units`)."""
    line = units.new_zeros(shape.numel() if old.axis is None else shape[old.axis])
    line.index_copy_(0, old.tensor.long(), units.view(-1))
    return line.index_select(0, new.tensor).view(units.shape)


def active_blocks(count: int, density: float, order: str, change: int, generator: torch.Generator) -> list[int]:
    """Which `round(density * count)` of `count` tensors are active after the `change`-th change (from 0).

    `random` draws anew each time; `ascending` and `descending` walk through the tensors from the first or
    last on and around; `mirror` takes half of them ascending in the first half of the tensors and the other half as
    their mirror images, so that with an odd `count` the middle tensor is never active.

    Raises `ValueError` for `mirror` with an odd number of active tensors.

    >>> [active_blocks(5, 0.4, "descending", change, torch.Generator()) for change in range(3)]
    [[3, 4], [1, 2], [0, 4]]
    """
    active = round(density * count)
    if order == "random":
        chosen = torch.randperm(count, generator=generator, device=generator.device)[:active].tolist()
    elif order == "ascending":
        chosen = [(change * active + i) % count for i in range(active)]
    elif order == "descending":
        chosen = [(count - 1 - change * active - i) % count for i in range(active)]
    elif order == "mirror":
        if active % 2:
            raise ValueError(
                f"block_order='mirror' needs an even number of active tensors, "
                f"got {active} (density {density} of {count} tensors)"
            )
        first = [(change * (active // 2) + i) % (count // 2) for i in range(active // 2)]
        chosen = first + [count - 1 - i for i in first]
    else:
        raise ValueError(f"block_order must be one of {', '.join(map(repr, BLOCK_ORDERS))}, got {order!r}")
    return sorted(chosen)
