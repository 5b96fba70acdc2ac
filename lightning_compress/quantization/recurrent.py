"""LSTM, GRU and RNN layers with quantized input and weights.

Every weight is quantized before the recurrence runs; the hidden state between its steps stays float, as it lives inside
one fused kernel. What the layer returns can be quantized by ``quantize_output``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.layers import CLASSES, ManyWeights


def recurrent_names(layer: nn.RNNBase) -> list[str]:
    """Return the names of a recurrent layer's parameters, in the order torch's kernels take them.

    >>> recurrent_names(nn.GRU(2, 3, bias=False, bidirectional=True))
    ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse']
    """
    names = []
    for depth in range(layer.num_layers):
        for direction in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            kinds = ["weight_ih", "weight_hh"]
            kinds += ["bias_ih", "bias_hh"] if layer.bias else []
            kinds += ["weight_hr"] if layer.proj_size > 0 else []
            names += [f"{kind}_l{depth}{direction}" for kind in kinds]
    return names


def recur(layer: nn.RNNBase, x: Any, hx: Any, weights: list[Tensor]) -> Any:
    """Return ``layer(x, hx)`` with other weights.

    Args:
        layer: LSTM, GRU or RNN.
        x: A tensor, with or without batch, or a packed sequence.
        hx: First hidden state, or ``None`` for zeros.
        weights: In the order of :func:`recurrent_names`.

    >>> layer, x = nn.LSTM(2, 3, num_layers=2), torch.randn(4, 2)
    >>> weights = [getattr(layer, name) for name in recurrent_names(layer)]
    >>> torch.equal(recur(layer, x, None, weights)[0], layer(x)[0])
    True
    """
    if isinstance(x, PackedSequence):
        batch = int(x.batch_sizes[0])
        hx = _states(layer, x.data, hx, batch, x.sorted_indices)
        with _loose(x.data):
            result = _kernel(layer)(x.data, x.batch_sizes, hx, weights, layer.bias, *_options(layer))
        output = PackedSequence(result[0], x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return output, _hidden(layer, result, x.unsorted_indices)
    dim = 0 if layer.batch_first else 1
    if x.dim() == 2:
        output, hidden = recur(layer, x.unsqueeze(dim), _each(hx, lambda h: h.unsqueeze(1)), weights)
        return output.squeeze(dim), _each(hidden, lambda h: h.squeeze(1))
    hx = _states(layer, x, hx, x.shape[dim], None)
    with _loose(x):
        result = _kernel(layer)(x, hx, weights, layer.bias, *_options(layer), layer.batch_first)
    return result[0], _hidden(layer, result, None)


@contextmanager
def _loose(x: Tensor) -> Iterator[None]:
    """Keep cuDNN from advising to flatten weights that are computed anew in each step."""
    with warnings.catch_warnings() if x.is_cuda else nullcontext():
        if x.is_cuda:
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
        yield


def _kernel(layer: nn.RNNBase) -> Any:
    name = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}.get(layer.mode)
    if name is None:
        raise ConfigurationError(f"`layer` must be an LSTM, GRU or RNN, got mode {layer.mode!r}")
    return getattr(torch, name)


def _options(layer: nn.RNNBase) -> tuple[Any, ...]:
    return layer.num_layers, layer.dropout, layer.training, layer.bidirectional


def _states(layer: nn.RNNBase, x: Tensor, hx: Any, batch: int, order: Tensor | None) -> Any:
    """Return the first hidden state as the kernels take it: zeros, or the given one in the order of the batch."""
    if hx is None:
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        h = x.new_zeros(count, batch, layer.proj_size or layer.hidden_size)
        return [h, x.new_zeros(count, batch, layer.hidden_size)] if layer.mode == "LSTM" else h
    hx = layer.permute_hidden(hx, order)
    return list(hx) if layer.mode == "LSTM" else hx


def _hidden(layer: nn.RNNBase, result: Any, order: Tensor | None) -> Any:
    hidden = tuple(result[1:]) if layer.mode == "LSTM" else result[1]
    return layer.permute_hidden(cast(Any, hidden), order)


def _each(states: Any, change: Any) -> Any:
    if states is None:
        return None
    return tuple(map(change, states)) if isinstance(states, tuple | list) else change(states)


class _Recurrent(ManyWeights):
    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return output and hidden state."""
        layer = cast(nn.RNNBase, self)
        if isinstance(input, PackedSequence):
            input = PackedSequence(
                self.quantized_input(input.data), input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
        else:
            input = self.quantized_input(input)
        return recur(layer, input, hx, [self.quantized(name) for name in recurrent_names(layer)])


class QuantizedLSTM(_Recurrent, nn.LSTM):
    """:class:`torch.nn.LSTM` with fake-quantized input and weights."""


class QuantizedGRU(_Recurrent, nn.GRU):
    """:class:`torch.nn.GRU` with fake-quantized input and weights."""


class QuantizedRNN(_Recurrent, nn.RNN):
    """:class:`torch.nn.RNN` with fake-quantized input and weights."""


CLASSES.update({nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU, nn.RNN: QuantizedRNN})
