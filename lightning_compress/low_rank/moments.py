r"""What a layer's outputs see, as far as it decides which factors keep them: the second moment of its inputs.

Activation-aware factors minimize :math:`\lVert X (W - \hat W)^\top \rVert_F` over calibration inputs X. All they need
of X is a square root of :math:`M = X^\top X`: as a matrix where there are many rows, from X itself where there are few.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.patches import layer_patches
from lightning_compress.low_rank.shapes import LayerShape

_UNSEEN = 1e-6
"""Weight of directions without inputs, relative to the mean of all: M may be singular."""


class Moment(ABC):
    r"""A second moment of any scale, and its root S: :math:`S S^\top = M`, and a little where nothing is seen."""

    @abstractmethod
    def energy(self, rows: Tensor) -> float:
        r"""Return :math:`\lVert X R^\top \rVert^2` of a matrix R (m, n), without what counts for unseen directions."""

    @abstractmethod
    def whiten(self, rows: Tensor) -> Tensor:
        """Return R S in float64."""

    @abstractmethod
    def unwhiten(self, rows: Tensor) -> Tensor:
        """Undo :meth:`whiten`."""


class SquareMoment(Moment):
    """A moment as a matrix.

    Args:
        matrix: (n, n).

    >>> moment = SquareMoment(torch.diag(torch.tensor([4.0, 0.0])))
    >>> moment.energy(torch.tensor([[1.0, 5.0]]))
    4.0
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def energy(self, rows: Tensor) -> float:
        """Return the energy of a matrix."""
        exact = rows.double()
        return float(((exact @ self.matrix.double().to(rows.device)) * exact).sum())

    def whiten(self, rows: Tensor) -> Tensor:
        """Return R L with the Cholesky factor L."""
        return rows.double() @ self._root(rows.device)

    def unwhiten(self, rows: Tensor) -> Tensor:
        """Undo :meth:`whiten`."""
        solved: Tensor = torch.linalg.solve_triangular(self._root(rows.device), rows.double(), upper=False, left=False)
        return solved

    def _root(self, device: torch.device) -> Tensor:
        scaled = self.matrix.double().to(device)
        usual = float(scaled.diagonal().mean())
        scaled = scaled / usual if usual > 0 else torch.zeros_like(scaled)
        added, eye = _UNSEEN, torch.eye(len(scaled), dtype=scaled.dtype, device=device)
        for _ in range(6):
            root, failed = torch.linalg.cholesky_ex(scaled + added * eye)
            if not bool(failed):
                break
            added *= 10
        return root * math.sqrt(usual if usual > 0 else 1.0)


class RowMoment(Moment):
    r"""A moment as the rows X that it is made of, fewer than they are long: no (n, n) matrix is ever built.

    With :math:`X^\top X = Q D^2 Q^\top` it is
    :math:`S = \sqrt u I + Q (\sqrt{D^2 + u} - \sqrt u) Q^\top`, u being what unseen directions count.

    Args:
        rows: (N, n).

    >>> moment = RowMoment(torch.tensor([[2.0, 0.0]]))
    >>> moment.energy(torch.tensor([[1.0, 5.0]]))
    4.0
    >>> bool(torch.allclose(moment.unwhiten(moment.whiten(torch.eye(2))), torch.eye(2).double(), atol=1e-6))
    True
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def energy(self, rows: Tensor) -> float:
        """Return the energy of a matrix."""
        return float((self.rows.to(rows) @ rows.t()).double().square().sum())

    def whiten(self, rows: Tensor) -> Tensor:
        """Return R S."""
        return self._times(rows, inverse=False)

    def unwhiten(self, rows: Tensor) -> Tensor:
        """Undo :meth:`whiten`."""
        return self._times(rows, inverse=True)

    def _times(self, rows: Tensor, inverse: bool) -> Tensor:
        given = self.rows.double().to(rows.device)
        usual = float(given.square().sum()) / given.shape[1]
        given = given / math.sqrt(usual) if usual > 0 else given
        values, left = torch.linalg.eigh(given @ given.t())
        kept = values > values[-1].clamp(min=1e-300) * 1e-12
        values, left = values[kept], left[:, kept]
        directions = given.t() @ (left / values.sqrt())
        scale = math.sqrt(usual if usual > 0 else 1.0)
        floor, sizes = scale * math.sqrt(_UNSEEN), scale * (values + _UNSEEN).sqrt()
        floor, sizes = (1 / floor, 1 / sizes) if inverse else (floor, sizes)
        exact = rows.double()
        return floor * exact + ((exact @ directions) * (sizes - floor)) @ directions.t()


def second_moment(layer: nn.Module, inputs: Tensor) -> Tensor:
    r"""Return :math:`\sum x x^\top` of what each output of a layer sees; add up over batches.

    Args:
        layer: Linear or Conv1d/2d/3d.
        inputs: What the layer was called with.

    Returns:
        (groups, n, n) in float64, n the inputs (of a group) times the kernel's size.

    >>> second_moment(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[1.0, 2.0], [2.0, 5.0]]]
    """
    rows = layer_patches(layer, inputs.detach()).double()
    return rows.transpose(1, 2) @ rows


@dataclass
class Seeing:
    """Gathers what a layer sees, batch by batch, in the smaller of two forms.

    Attributes:
        rows: (groups, N, n), while they are fewer than they are long.
        square: (groups, n, n) in float64, of all rows that are not kept.

    >>> seeing = Seeing()
    >>> seeing.add(torch.ones(1, 1, 2))
    >>> seeing.add(torch.ones(1, 2, 2))
    >>> seeing.rows is None, seeing.square.tolist()
    (True, [[[3.0, 3.0], [3.0, 3.0]]])
    """

    rows: Tensor | None = field(default=None, repr=False)
    square: Tensor | None = field(default=None, repr=False)

    def add(self, rows: Tensor) -> None:
        """Add rows (groups, N, n)."""
        if self.square is None:
            rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=1)
            self.rows = rows
            if rows.shape[1] < rows.shape[2]:
                return
            self.rows, self.square = None, torch.zeros(1, dtype=torch.float64, device=rows.device)
        exact = rows.double()
        self.square = self.square + exact.transpose(1, 2) @ exact

    def moments(self) -> list[Moment]:
        """Return the moment of each group."""
        if self.square is not None:
            return [SquareMoment(matrix) for matrix in self.square]
        return [] if self.rows is None else [RowMoment(rows) for rows in self.rows]


def check_moment(moment: Tensor, shape: LayerShape) -> None:
    """Raise a ConfigurationError if a moment (groups, n, n) is not one of a layer's inputs."""
    size = shape.inputs // shape.groups * math.prod(shape.kernel)
    if tuple(moment.shape) != (shape.groups, size, size):
        raise ConfigurationError(
            f"`moment` must be of shape {(shape.groups, size, size)} for this layer, got {tuple(moment.shape)}; "
            "take it from `second_moment(layer, inputs)`"
        )
    if not bool(torch.isfinite(moment).all()):
        raise ConfigurationError("`moment` holds infinite or undefined numbers; check the calibration inputs")
