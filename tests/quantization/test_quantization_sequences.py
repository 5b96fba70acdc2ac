"""Recurrent layers and attention: equal to torch's with quantized weights, in all forms of a call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_compress.quantization import (
    ACTIVATION,
    WEIGHT,
    quantize_layer,
    quantizers_of,
    update_ranges,
    weight_quantizers_of,
)
from lightning_compress.quantization.attention import keep_padded
from lightning_compress.quantization.layers import weight_of

RECURRENT = {
    "lstm": lambda: nn.LSTM(4, 6, batch_first=True),
    "lstm_deep": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3),
    "gru": lambda: nn.GRU(4, 6, num_layers=2, bias=False),
    "rnn_relu": lambda: nn.RNN(4, 6, nonlinearity="relu", batch_first=True, bidirectional=True),
    "rnn_tanh": lambda: nn.RNN(4, 6),
}


def quantized(layer: nn.Module, bits: int = 4) -> nn.Module:
    weight, activation = WEIGHT.with_bits(bits).to_config(), ACTIVATION.to_config()
    more = {"key": activation, "value": activation} if isinstance(layer, nn.MultiheadAttention) else {}
    return quantize_layer(layer, weight, activation, **more)


def switch_on(layer: nn.Module, *args: object, **kwargs: object) -> None:
    for quantizer in quantizers_of(layer):
        quantizer.observing = quantizer.enabled = True
    for quantizer in weight_quantizers_of(layer).values():
        quantizer.ready = True
    layer.train()(*args, **kwargs)
    update_ranges(quantizers_of(layer))


def with_quantized_weights(dense: nn.Module, layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, quantizer in weight_quantizers_of(layer).items():
            weight = weight_of(dense, name)
            scale = weight.abs().amax(1, keepdim=True) / 7
            weight.copy_(torch.round(weight / scale) * scale)
            assert torch.equal(quantizer.affine(weight_of(layer, name))[0], scale[:, 0])
    return dense


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]  # type: ignore[attr-defined]


def same(a: object, b: object) -> bool:
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_in_all_forms(name: str) -> None:
    layer = RECURRENT[name]()
    dense, keys = copy.deepcopy(layer), set(layer.state_dict())
    parameters = dict(layer.named_parameters())
    quantized(layer)
    assert keys < set(layer.state_dict())
    assert all(layer.get_parameter(key) is value for key, value in parameters.items())
    x = torch.randn(3, 5, 4)
    packed = pack_padded_sequence(x, [2, 5, 3], batch_first=layer.batch_first, enforce_sorted=False)
    if not layer.batch_first:
        packed = pack_padded_sequence(torch.randn(5, 3, 4), [2, 5, 3], enforce_sorted=False)
    for given in (x, x[0], packed):
        assert same(layer(given), dense(given))
        assert same(layer(given, layer(given)[1]), dense(given, dense(given)[1]))
    switch_on(layer, x)
    with_quantized_weights(dense, layer)
    assert same(layer(x), dense(layer.input_quantizer(x)))
    flat(layer(x))[0].sum().backward()
    weights = [p for key, p in parameters.items() if key.startswith("weight")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


@pytest.mark.parametrize("form", ["self", "cross", "sizes", "seq_first", "no_batch"])
def test_attention_in_all_forms(form: str) -> None:
    first = form != "seq_first"
    sizes = {"kdim": 6, "vdim": 5} if form == "sizes" else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=first, **sizes)
    dense, keys = copy.deepcopy(layer), set(layer.state_dict())
    quantized(layer)
    assert keys < set(layer.state_dict())
    q = torch.randn(3, 5, 8)
    k = q if form in ("self", "seq_first") else torch.randn(3, 4, 6 if form == "sizes" else 8)
    v = torch.randn(3, 4, 5) if form == "sizes" else k
    q, k, v = (q[0], k[0], v[0]) if form == "no_batch" else (q, k, v)
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool) if form == "cross" else None
    options = {"attn_mask": mask, "need_weights": form == "self"}
    with torch.no_grad():
        assert same(layer.eval()(q, k, v, **options)[0], dense.eval()(q, k, v, **options)[0])
    switch_on(layer, q, k, v, **options)
    with_quantized_weights(dense, layer)
    inputs = [layer.input_quantizer(q)]
    inputs.append(inputs[0] if k is q else layer.key_quantizer(k))
    inputs.append(inputs[1] if v is k else layer.value_quantizer(v))
    output, scores = layer(q, k, v, **options)
    expected, weights = dense.train()(*inputs, **options)
    assert torch.allclose(output, expected, atol=1e-6)
    assert (scores is None) == (weights is None)
    assert len(inputs[0].unique()) > 10


def test_the_fast_path_of_encoder_layers_does_not_pass_by() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    dense = copy.deepcopy(encoder)
    for part in list(encoder.modules()):
        if type(part) in (nn.Linear, nn.MultiheadAttention):
            quantized(part, bits=2)
    keep_padded(encoder)
    switch_on(encoder, x)
    for part in encoder.modules():
        for quantizer in weight_quantizers_of(part).values():
            quantizer.ready = True
    trained = encoder(x)
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(x), trained, atol=1e-5)
        assert not torch.allclose(dense.eval()(x), trained, atol=1e-2)
        padded = encoder(x, src_key_padding_mask=padding)
        assert torch.allclose(padded, encoder.train()(x, src_key_padding_mask=padding), atol=1e-5)
