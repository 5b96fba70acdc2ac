import gzip
import tracemalloc

import pytest
import torch
import torchvision
from safetensors.torch import load, save, save_model
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.evaluation.size import dense_bytes, gzip_bytes, iterate_file

DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float64", "complex64"]


def mixed() -> nn.Module:
    model = torchvision.models.mobilenet_v2(num_classes=3)
    for name in [*DTYPES, "float8_e4m3fn", "float8_e5m2"]:
        model.register_buffer(f"of_{name}", torch.zeros(3).to(getattr(torch, name)))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer('odd "ü"', torch.zeros(2, 2).T)
    return model


def test_equals_the_library_byte_for_byte():
    model = mixed()
    reference = save({key: value.contiguous() for key, value in model.state_dict().items()})
    assert b"".join(iterate_file(model)) == reference
    assert dense_bytes(model) == len(reference)


def test_a_transposed_weight_is_stored_as_it_reads():
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(torch.arange(6.0).reshape(3, 2).T)
    assert load(b"".join(iterate_file(model)))["weight"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_tied_weights_count_once(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "model.safetensors"), metadata=None)
    tied = dense_bytes(model)
    assert load((tmp_path / "model.safetensors").read_bytes()).keys() == {"0.weight"}
    assert 32 * 32 * 4 < tied < 32 * 32 * 4 + 100


def test_needs_no_values():
    model = torchvision.models.resnet18()
    with torch.device("meta"):
        empty = torchvision.models.resnet18()
    assert dense_bytes(empty) == dense_bytes(model)
    with pytest.raises(ConfigurationError, match="meta device"):
        gzip_bytes(empty)


def test_gzip_equals_the_standard_library():
    model = mixed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter.abs() < 0.02] = 0
    done = []
    size = gzip_bytes(model, done.append)
    assert abs(size - len(gzip.compress(b"".join(iterate_file(model)), 6))) < 16
    assert sum(done) == dense_bytes(model)


def test_gzip_streams():
    model = nn.Linear(4096, 2048)
    nn.init.zeros_(model.weight)
    tracemalloc.start()
    gzip_bytes(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * 2**20 < 4096 * 2048 * 4


def test_a_dtype_the_format_lacks_is_named():
    model = nn.Linear(2, 2)
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ConfigurationError, match="complex128 in 'wide'"):
        dense_bytes(model)
