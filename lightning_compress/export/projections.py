r"""LSTM layers with projections in operators that have none: the recurrence runs on what is projected.

With the projection :math:`r_t = P m_t` of :math:`m_t = o_t \odot \tanh c_t`, what a step takes from the one before is
:math:`W_{hh} r_{t-1} = (W_{hh} P)\, m_{t-1}`, and a layer above takes :math:`(W_{ih} P)\, m_t`. So an LSTM of the
same hidden size with those weights has the states :math:`c_t` and :math:`m_t`, and the rest is projecting its results.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.core.errors import CompressionError
from lightning_compress.quantization.layers import ManyWeights
from lightning_compress.quantization.recurrent import recur, recurrent_names


def move_projections(model: nn.Module, ahead: bool = False) -> list[str]:
    """Let each LSTM with projections compute by an LSTM without them, in place; the results stay the same.

    Args:
        model: In evaluation mode.
        ahead: Whether weights are multiplied now. Else that is done whenever it runs, and they keep their type in a
            file: integers stay integers.

    Returns:
        Paths of the layers; none that was changed before.

    >>> layer = nn.LSTM(2, 6, num_layers=2, bidirectional=True, proj_size=3).eval().double()
    >>> x = torch.randn(5, 1, 2).double()
    >>> expected = layer(x)[0]
    >>> move_projections(layer)
    ['']
    >>> torch.allclose(layer(x)[0], expected)
    True
    """
    moved = []
    for path, part in model.named_modules():
        if isinstance(part, nn.LSTM) and part.proj_size > 0 and "forward" not in vars(part):
            part.forward = _Moved(part, ahead)  # type: ignore[method-assign]  # the object and its names in the file stay
            moved.append(path)
    return moved


def fold_projections(layer: nn.LSTM, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of an equivalent LSTM without projections, and the projections, (proj, hidden) each.

    Args:
        layer: With projections.
        weights: Its own, in the order of :func:`~lightning_compress.quantization.recurrent.recurrent_names`.
    """
    each = 5 if layer.bias else 3
    parts = [weights[start : start + each] for start in range(0, len(weights), each)]
    directions = 2 if layer.bidirectional else 1
    folded: list[Tensor] = []
    below: list[Tensor] = []
    for depth in range(layer.num_layers):
        here = parts[depth * directions : (depth + 1) * directions]
        for own in here:
            pieces = own[0].split(layer.proj_size, dim=1) if below else ()
            w_ih = torch.cat([piece @ p for piece, p in zip(pieces, below, strict=True)], 1) if below else own[0]
            folded += [w_ih, own[1] @ own[-1], *own[2:-1]]
        below = [own[-1] for own in here]
    return folded, [own[-1] for own in parts]


class _Moved:
    """What an LSTM with projections does instead of its own forward."""

    def __init__(self, layer: nn.LSTM, ahead: bool) -> None:
        self.layer, self.plain = layer, _plain(layer)
        with torch.no_grad():
            folded, projections = fold_projections(layer, _weights(layer))
            self.inverses = _inverses(projections)
        self.known = (folded, projections) if ahead else None

    def __call__(self, input: Any, hx: Any = None) -> Any:
        """Return output and hidden state."""
        layer = self.layer
        if isinstance(input, PackedSequence):
            return type(layer).forward(layer, input, hx)
        x = layer.quantized_input(input) if isinstance(layer, ManyWeights) else input
        weights, projections = self.known or fold_projections(layer, _weights(layer))
        if hx is not None:
            hx = _each(hx[0], self.inverses), hx[1]
        output, (m, c) = recur(self.plain, x, hx, weights)
        last = projections[-2:] if layer.bidirectional else projections[-1:]
        sides = output.split(layer.hidden_size, dim=-1)
        return torch.cat([side @ p.t() for side, p in zip(sides, last, strict=True)], -1), (_each(m, projections), c)


def _weights(layer: nn.LSTM) -> list[Tensor]:
    read = layer.quantized if isinstance(layer, ManyWeights) else partial(getattr, layer)
    return [cast(Tensor, read(name)) for name in recurrent_names(layer)]


def _plain(layer: nn.LSTM) -> nn.LSTM:
    """Return an LSTM of the same sizes without projections, for its settings alone."""
    return nn.LSTM(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.batch_first,
        layer.dropout,
        layer.bidirectional,
        device="meta",
    ).eval()


def _inverses(projections: list[Tensor]) -> list[Tensor]:
    """Return matrices that give an :math:`m` whose projection is a given hidden state, (hidden, proj) each.

    None if a projection does not reach all states; an error then if a state is given.
    """
    exact = [p.detach().double() for p in projections]
    whole = all(int(torch.linalg.matrix_rank(p)) == len(p) for p in exact)
    return [torch.linalg.pinv(p).to(q) for p, q in zip(exact, projections, strict=True)] if whole else []


def _each(states: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return the state of each layer and direction, multiplied with a matrix of its own."""
    if len(matrices) != len(states):
        raise CompressionError("an LSTM is given a hidden state that its projection cannot reach; start it at zero")
    return torch.stack([state @ matrix.t() for state, matrix in zip(states, matrices, strict=True)])
