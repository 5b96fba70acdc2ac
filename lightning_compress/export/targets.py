"""One function that writes a network for a runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.core.errors import CompressionError, ConfigurationError, did_you_mean
from lightning_compress.export.extras import require
from lightning_compress.export.onnx_program import reason_of, write_onnx
from lightning_compress.export.preparation import Prepared, prepare
from lightning_compress.export.programs import write_executorch, write_openvino, write_torch, write_torchao
from lightning_compress.export.result import Exported, ExportError

_WRITERS: dict[str, tuple[str, Callable[..., Exported]]] = {
    "onnx": (".onnx", write_onnx),
    "openvino": (".xml", write_openvino),
    "torch": (".pt2", write_torch),
    "torchao": (".pt2", write_torchao),
    "executorch": (".pte", write_executorch),
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "torchao": ("torchao",),
    "executorch": ("executorch",),
}
TARGETS = tuple(_WRITERS)
"""What :func:`export` can write."""


def export(
    model: nn.Module,
    path: str | Path,
    target: str = "onnx",
    *,
    example_inputs: Any = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    int4: bool = False,
) -> Exported:
    """Write a network, float or quantized, whole or compressed, for a runtime, and check that it computes the same.

    A fake-quantized network becomes integers first (see :func:`~lightning_compress.quantization.convert.convert`), on
    a copy. The targets:

    - ``"onnx"`` (extra ``[onnx]``): one ``.onnx`` file of opset 20 for onnxruntime, OpenVINO, TensorRT; integer weights
      as int8 initializers, activations between QuantizeLinear and DequantizeLinear. Checked by onnx, and run by
      onnxruntime.
    - ``"openvino"`` (``[openvino]``): ``.xml`` and ``.bin``, by way of ONNX. Run by OpenVINO in float32.
    - ``"torch"``: ``.pt2``, for ``torch.export.load`` without this package; integers are stored, arithmetic is float.
    - ``"torchao"`` (``[torchao]``): ``.pt2`` with the quantized operators that TorchInductor turns into integer
      kernels: import ``torchao.quantization.pt2e``, then ``torch.compile(torch.export.load(path).module())`` in a
      process with ``TORCHINDUCTOR_FREEZING=1``.
    - ``"executorch"`` (``[executorch]``): ``.pte`` for ExecuTorch's XNNPACK.

    Quantization makes a file smaller everywhere, and a network faster where the runtime has integer kernels for what
    it is made of: convolutions and linear layers with activations quantized around them. 4-bit weights are for storage.
    In ONNX the bias of a quantized linear layer is int32, in steps of input scale times weight scale, and onnxruntime
    makes that of convolutions such; beside inputs of fewer than 8 bits, or where that would move outputs of a linear
    layer by about a hundredth of their spread, it is added behind the layer in float. Networks in bfloat16 or float64
    are written in float32 for all but ``"torch"``.

    Args:
        model: Any module, a LightningModule too; it is not changed.
        path: The file to write; missing folders are made, a missing ending is added.
        target: One of the above.
        example_inputs: One batch (a tensor, a tuple of positional or a mapping of keyword arguments, which may be
            mappings themselves); by default the module's ``example_input_array``.
        dynamic_batch: Whether the first dimension of the inputs may change; if the model does not allow it, the result
            says so.
        verify: Whether to run the file on the example inputs and compare.
        int4: Store weights that 4 bits can hold in 4 bits (ONNX opset 21); runtimes then compute more slowly.

    Returns:
        Where it lies, its size, and what stays float.

    Raises:
        ConfigurationError: For an unknown target, a missing package, no example inputs, or a path that is no file's.
        ExportError: If the model cannot be traced, or the runtime cannot run it or computes something else.
    """
    check_target(target)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(path, str | Path):
        raise ConfigurationError(f"`path` must be the name of a file, got {path!r}")
    ending = _WRITERS[target][0]
    final = Path(path) if Path(path).suffix == ending else Path(f"{path}{ending}")
    folder = next((each for each in (Path(path), final) if each.is_dir()), None)
    if folder is not None:
        raise ConfigurationError(f"`path` is the folder {str(folder)!r}; name a file in it")
    if int4 and target != "onnx":
        raise ConfigurationError(f"`int4` is for the target 'onnx', got target={target!r}")
    prepared = prepare(model, example_inputs, any_type=target == "torch")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"`path`: the folder of {str(final)!r} cannot be made ({error}); name another"
        ) from error
    return _write_aside(target, prepared, final, dynamic_batch=dynamic_batch, verify=verify, int4=int4)


def check_target(target: str, needs: bool = False) -> None:
    """Refuse a target that :func:`export` does not know.

    Args:
        target: Its name.
        needs: Whether the packages that it needs must be there.

    Raises:
        ConfigurationError: Names the nearest target, or the extra to install.

    >>> check_target("onnx")
    """
    if target not in _WRITERS:
        raise ConfigurationError(f"`target` is {target!r}; {did_you_mean(str(target), TARGETS, len(TARGETS))}")
    for module in _NEEDS.get(target, ()) if needs else ():
        require(module, target)


def _write_aside(target: str, prepared: Prepared, final: Path, **options: bool) -> Exported:
    """Write in a folder of its own beside the file, then move what it wrote into place."""
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as folder:
        try:
            made = _WRITERS[target][1](prepared, Path(folder, final.name), **options)
        except (CompressionError, OSError):
            raise
        except Exception as error:  # checkers and runtimes have types of their own, and several each
            raise ExportError(
                f"what was written for `target` {target!r} cannot be read back or run: {reason_of(error)}. It may "
                "hold something that this runtime lacks; try another target, or other layers in its place"
            ) from error
        files = sorted(Path(folder).iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, final.parent / file.name)
    return Exported(final, made.target, size, made.opset, made.dynamic_batch, made.difference, made.left)
