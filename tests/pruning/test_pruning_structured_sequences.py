"""Recurrent layers of several layers and directions, and heads of attention: cut, or named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lightning_compress as lc
from lightning_compress import ConfigurationError, StructuredPruning, coupled_groups
from lightning_compress.core.cost import count_macs
from lightning_compress.core.paths import named_layers
from lightning_compress.pruning.structured.groups import Zeroing, parameter_in
from lightning_compress.pruning.structured.heads import HeadAttention, keep_heads

TOKENS = torch.arange(20).reshape(2, 10)


class Recurrent(nn.Module):
    """A text model that reads outputs, last states, or a packed sequence's last states."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, both: bool, read: str, **more: int) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(50, 24), read
        self.recur = kind(24, 32, num_layers=layers, bidirectional=both, batch_first=True, **more)
        self.head = nn.Linear((more.get("proj_size") or 32) * (1 + both), 3)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.embed(tokens)
        if self.read == "packed":
            inputs = pack_padded_sequence(inputs, torch.tensor([10, 7]), batch_first=True)
        outputs, states = self.recur(inputs)
        if self.read == "outputs":
            return self.head(outputs[:, -1])
        states = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat([states[-2], states[-1]], 1) if self.recur.bidirectional else states[-1])


class Translator(nn.Module):
    """The states of one LSTM start another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(32, 50)
        self.encode, self.decode = nn.LSTM(24, 32, batch_first=True), nn.LSTM(24, 32, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.embed(tokens)
        return self.head(self.decode(inputs, self.encode(inputs)[1])[0])


class Encoder(nn.Module):
    """torch's own encoder layers, with padding."""

    def __init__(self, nested: bool = False, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 3)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encode(self.embed(tokens), src_key_padding_mask=tokens > 17).mean(1))


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.attend = nn.Linear(8, 16), nn.Linear(8, 16), nn.MultiheadAttention(16, 4, bias=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.query(x), self.key(x), self.key(x), need_weights=False)[0])


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "lstm_two_layers_both_directions": (lambda: Recurrent(nn.LSTM, 2, True, "outputs"), TOKENS, "recur"),
    "lstm_states_of_both_directions": (lambda: Recurrent(nn.LSTM, 1, True, "states"), TOKENS, "recur"),
    "gru_two_layers_packed": (lambda: Recurrent(nn.GRU, 2, True, "packed"), TOKENS, "recur"),
    "rnn_three_layers": (lambda: Recurrent(nn.RNN, 3, False, "states"), TOKENS, "recur"),
    "encoder_decoder": (Translator, TOKENS, "encode"),
    "encoder_layers": (Encoder, TOKENS, "encode.layers.0.self_attn"),
    "encoder_layers_norm_first": (lambda: Encoder(norm_first=True), TOKENS, "encode.layers.1.linear1"),
    "cross_attention": (Crossed, torch.rand(2, 5, 8), "attend"),
}


@pytest.mark.parametrize("name", CASES)
def test_sequence_models_are_cut(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, inputs, cut = CASES[name]
    net, callback = build(), StructuredPruning(0.5, ranking={"scope": "layer"})
    sliced = lc.compress(net, callback, example_inputs=inputs)
    assert cut in callback._cuts

    masked = copy.deepcopy(net)
    Zeroing(callback._groups, callback._cuts)(parameter_in(named_layers(masked)))
    with torch.no_grad():
        expected, got = masked.eval()(inputs), sliced.eval()(inputs)
    assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())
    before, after = count_macs(net, inputs).total, count_macs(sliced, inputs).total
    assert before
    assert after / before == pytest.approx(callback.history[0]["macs"], abs=1e-9)

    lc.save_compressed(sliced, tmp_path / "cut.safetensors")
    bare = lc.load_compressed(build(), tmp_path / "cut.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(bare(inputs), got)
    bare.train()(inputs).square().sum().backward()
    assert [n for n, p in bare.named_parameters() if p.grad is None] == []

    again = StructuredPruning(0.3, ranking={"scope": "layer"})
    assert lc.compress(bare.eval(), again, example_inputs=inputs)(inputs).shape == got.shape


@pytest.mark.parametrize(
    ("net", "path", "reason"),
    [
        (Recurrent(nn.LSTM, 1, False, "outputs", proj_size=8), "recur", "projection"),
        (Encoder(nested=True), "encode.layers.0.self_attn", "enable_nested_tensor=False"),
        (Encoder(), "encode.layers.0.self_attn.out_proj", "width of its outputs"),
        (Encoder(), "embed", "LayerNorm"),
        (Crossed(), "query", "attention"),
    ],
)
def test_what_stays_in_sequence_models_is_named(net: nn.Module, path: str, reason: str) -> None:
    example = torch.rand(2, 5, 8) if isinstance(net, Crossed) else TOKENS
    assert reason in coupled_groups(net, example).left[path]


def test_selected_heads_only_and_no_rounding_of_heads() -> None:
    torch.manual_seed(0)
    select = lc.Select(types=("MultiheadAttention",))
    callback = StructuredPruning(0.5, select=select, limits={"round_to": 16}, ranking={"scope": "layer"})
    sliced = lc.compress(Encoder(), callback, example_inputs=TOKENS)
    kinds = {path: m.num_heads for path, m in sliced.named_modules() if isinstance(m, HeadAttention)}
    assert kinds == {"encode.layers.0.self_attn": 2, "encode.layers.1.self_attn": 2}
    assert sliced.encode.layers[0].linear1.out_features == 64


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["", "bool", "float", "per_head"])
def test_all_heads_kept_compute_what_torch_does(batch_first: bool, masked: str) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    heads = keep_heads(whole, [[0, 1]])
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 4] = True
    x = x if batch_first else x.transpose(0, 1)
    mask = {
        "": None,
        "bool": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1),
        "float": torch.randn(5, 5),
        "per_head": torch.randn(6, 5, 5),
    }[masked]
    padding_mask = padding if masked in ("", "bool") else torch.zeros(3, 5).masked_fill(padding, float("-inf"))
    for average in (True, False):
        for need in (True, False):
            arguments = {"need_weights": need, "average_attn_weights": average, "attn_mask": mask}
            expected, weights = whole(x, x, x, key_padding_mask=padding_mask, **arguments)
            got, own = heads(x, x, x, key_padding_mask=padding_mask, **arguments)
            assert torch.allclose(expected, got, atol=1e-6)
            assert (weights is None and own is None) or torch.allclose(weights, own, atol=1e-6)
    single = x[0] if batch_first else x[:, 0]
    assert torch.allclose(whole(single, single, single)[0], heads(single, single, single)[0], atol=1e-6)


@pytest.mark.parametrize("heads", [[], [4], [[0, 9]], [2, 1], [[0, 1], 1], [[0, 10**12]]])
def test_hostile_heads_are_refused(heads: list) -> None:
    with pytest.raises(ConfigurationError, match=r"must rise and lie in 0\.\.3"):
        keep_heads(nn.MultiheadAttention(8, 4), heads)
    with pytest.raises(ConfigurationError, match="of attention only, not of Linear"):
        keep_heads(nn.Linear(8, 4), [0])


def test_a_mask_for_each_of_the_old_heads_is_refused() -> None:
    heads = keep_heads(nn.MultiheadAttention(8, 4, batch_first=True), [0, 2])
    with pytest.raises(ConfigurationError, match="`attn_mask` has 12 masks"):
        heads(*[torch.zeros(3, 5, 8)] * 3, attn_mask=torch.zeros(12, 5, 5))
