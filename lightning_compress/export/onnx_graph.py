"""Small changes of a finished ONNX graph: quantized values stay quantized on their way, and weights of 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_compress.export.extras import require

MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity", "Expand")
"""Operators whose results are values of their first input."""
EXTREMES = ("ReduceMax", "ReduceMin")
"""Operators whose results are the greatest or the least of their inputs."""
BIASED = ("Gemm", "Conv", "ConvTranspose")
"""Operators whose third input is a bias."""


def finish(model: Any, int4: bool) -> None:
    """Change an ``onnx_ir`` model in place.

    Args:
        model: What ``torch.onnx.export`` made.
        int4: Whether to store int8 weights that 4 bits can hold in 4 bits.
    """
    register_lost(model.graph)
    for node in list(model.graph):
        if averages_all(node):
            pool(model.graph, node)
        if node.op_type in EXTREMES:
            quantize_before(model.graph, node)
    for node in list(model.graph):
        node.metadata_props.clear()  # stack traces, which can take more room than weights
        for value in node.outputs:
            value.metadata_props.clear()
        if node.op_type in MOVES or adds_zeros(node):
            repeat_quantization(model.graph, node)
    for node in list(model.graph):
        if node.op_type in BIASED and has_quantized_bias(node):
            settle_bias(model.graph, node)
    if int4:
        store_four_bits(model.graph)
    remove_unused(model.graph)


def register_lost(graph: Any) -> None:
    """Register constants that nodes read but the graph does not list, each under a name of its own.

    The exporter's own optimizer leaves such: bounds of two clips of one value, which it names alike.
    """
    for node in graph:
        for value in node.inputs:
            known = value is None or value.is_initializer() or value.is_graph_input() or value.producer() is not None
            if not known and value.const_value is not None:
                while value.name in graph.initializers:
                    value.name += "_"
                graph.register_initializer(value)


def averages_all(node: Any) -> bool:
    """Return whether a node takes the mean over all positions of each channel, of quantized values (N, C, ...)."""
    if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    before, shape, axes = node.inputs[0].producer(), node.inputs[0].shape, ir_constant(node.inputs[1])
    if before is None or before.op_type != "DequantizeLinear" or shape is None or axes is None:
        return False
    rank = len(shape)
    return rank > 2 and sorted(int(axis) % rank for axis in axes.reshape(-1)) == list(range(2, rank))


def pool(graph: Any, node: Any) -> None:
    """Make a mean over all positions a GlobalAveragePool: runtimes compute that in integers, and a mean in floats."""
    keeps = node.attributes.get("keepdims")
    if keeps is not None and not keeps.as_int() and not drop_later(graph, node):
        return
    node.op_type = "GlobalAveragePool"
    node.attributes.clear()
    node.resize_inputs(1)


def drop_later(graph: Any, mean: Any) -> bool:
    """Drop the positions of a mean in a node of its own, behind its quantizer, which must follow the mean itself.

    Returns:
        Whether that is done; not where one of these is an output of the network.
    """
    ir = require("onnx_ir", "onnx")
    values = [mean.outputs[0]]
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        users = [user.node for user in values[-1].uses()]
        values += [user.outputs[0] for user in users if len(users) == 1 and user.op_type == op_type]
    values = values if len(values) == 3 else values[:1]
    last, axes = values[-1], np.arange(2, len(mean.inputs[0].shape), dtype=np.int64)
    if any(value.is_graph_output() for value in values):
        return False
    users = list(last.uses())
    squeeze = ir.Node("", "Squeeze", [last, _initializer(graph, f"{last.name}_positions", axes)])
    squeeze.outputs[0].dtype, squeeze.outputs[0].shape = last.dtype, last.shape
    for user, index in users:
        user.replace_input_with(index, squeeze.outputs[0])
    graph.insert_after(last.producer(), squeeze)
    for value in values:
        value.shape = ir.Shape([*squeeze.outputs[0].shape, *[1] * axes.size])
    return True


def quantize_before(graph: Any, node: Any) -> None:
    """Put the quantizer of an extreme in front of it too: rounding keeps order, so that the result is the same.

    OpenVINO computes a quantizer into the extreme that it stands behind, and the result is wrong (seen in 2026.4).
    """
    quantizer = node
    while quantizer is node or quantizer.op_type in (*MOVES, "Concat"):
        users = list(quantizer.outputs[0].uses())
        if len(users) != 1 or quantizer.outputs[0].is_graph_output():
            return
        quantizer = users[0].node
    before = node.inputs[0].producer()
    if quantizer.op_type != "QuantizeLinear" or (before is not None and before.op_type == "DequantizeLinear"):
        return
    made = _quantizer(node.inputs[0], *quantizer.inputs[1:])
    graph.insert_before(node, made)
    node.replace_input_with(0, made[1].outputs[0])


def adds_zeros(node: Any) -> bool:
    """Return whether a node adds a border that is on the grid of its input already: of zeros, or of repeated values."""
    if node.op_type != "Pad":
        return False
    mode, value = node.attributes.get("mode"), node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or (mode is not None and mode.as_string() != "constant"):
        return True
    constant = ir_constant(value)
    return constant is not None and not constant.any()


def ir_constant(value: Any) -> Any:
    """Return the array of a value that is known before the network runs, else ``None``."""
    known = require("onnx_ir", "onnx").convenience.get_const_tensor(value)
    return None if known is None else known.numpy()


def repeat_quantization(graph: Any, node: Any) -> None:
    """Put the quantizer of what ``node`` moves behind it too, as runtimes look for it right before each layer."""
    value, result = node.inputs[0], node.outputs[0]
    before = value.producer()
    if before is None or before.op_type != "DequantizeLinear" or before.inputs[0].is_initializer():
        return
    users = list(result.uses())
    if not users or result.is_graph_output() or any(user.node.op_type == "QuantizeLinear" for user in users):
        return
    made = _quantizer(result, *before.inputs[1:])
    graph.insert_after(node, made)
    for node_, index in users:
        node_.replace_input_with(index, made[1].outputs[0])


def _quantizer(value: Any, scale: Any, zero_point: Any) -> list[Any]:
    """Return two nodes that quantize a value and restore it."""
    ir = require("onnx_ir", "onnx")
    quantize = ir.Node("", "QuantizeLinear", [value, scale, zero_point])
    restore = ir.Node("", "DequantizeLinear", [quantize.outputs[0], scale, zero_point])
    for node, dtype in ((quantize, zero_point.dtype), (restore, value.dtype)):
        node.outputs[0].dtype = dtype
        node.outputs[0].shape = value.shape
    return [quantize, restore]


def has_quantized_bias(node: Any) -> bool:
    """Return whether a linear or convolution layer has a bias that is known, and both its operands are quantized."""
    producers = [value.producer() for value in node.inputs[:2]]
    quantized = all(before is not None and before.op_type == "DequantizeLinear" for before in producers)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return quantized and bias is not None and bias.is_initializer() and producers[1].inputs[0].is_initializer()


def settle_bias(graph: Any, node: Any) -> None:
    """Add the bias of a quantized layer behind it, in float, where int32 would be too coarse; else make it int32.

    As int32 it has the product of the scales of input and weight, far finer than either. Without onnxruntime computes a
    linear layer in floats; to convolutions it gives int32 biases itself. That is too coarse where outputs would move by
    more than a hundredth of their spread, and beside inputs of fewer than 8 bits: of a little that is lost the next
    rounding to few bits makes whole steps.
    """
    if has_few_levels(node.inputs[0].producer()):
        add_behind(graph, node)
        return
    if node.op_type != "Gemm":
        return
    ir = require("onnx_ir", "onnx")
    bias, weight = node.inputs[2], node.inputs[1].producer()
    scales = [value.producer().inputs[1].const_value.numpy() for value in node.inputs[:2]]
    scale = np.broadcast_to(scales[0] * scales[1], bias.shape.numpy()).astype(np.float32)
    sums = np.round(bias.const_value.numpy().astype(np.float64) / scale)
    moved = np.abs(bias.const_value.numpy().astype(np.float64) / scale - sums)
    if np.abs(sums).max(initial=0) > np.iinfo(np.int32).max or (moved > _MOVED * _spread(node, weight)).any():
        add_behind(graph, node)
        return
    arrays = {"int32": sums.astype(np.int32), "scale": scale, "zero_point": np.zeros(scale.shape, np.int32)}
    made = [_initializer(graph, f"{bias.name}_{node.outputs[0].name}_{key}", array) for key, array in arrays.items()]
    restore = ir.Node("", "DequantizeLinear", made, [ir.AttrInt64("axis", 0)])
    restore.outputs[0].dtype, restore.outputs[0].shape = bias.dtype, bias.shape
    graph.insert_before(node, restore)
    node.replace_input_with(2, restore.outputs[0])


def add_behind(graph: Any, node: Any) -> None:
    """Add the bias of a layer in a node of its own, in float.

    Within the layer onnxruntime would round it to int32 itself.
    """
    ir = require("onnx_ir", "onnx")
    bias, product = node.inputs[2], node.outputs[0]
    if node.op_type != "Gemm":
        array = bias.const_value.numpy().reshape(-1, *[1] * (len(node.inputs[1].shape) - 2))
        bias = _initializer(graph, f"{bias.name}_{product.name}_channels", array)
    users = list(product.uses())
    add = ir.Node("", "Add", [product, bias])
    result = add.outputs[0]
    result.dtype, result.shape = product.dtype, product.shape
    graph.insert_after(node, add)
    node.resize_inputs(2)
    for user, index in users:
        user.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is product:
            result.name, product.name = product.name, f"{product.name}_without_bias"
            graph.outputs[index] = result


def has_few_levels(restore: Any) -> bool:
    """Return whether what a DequantizeLinear restores was clipped to fewer values than 8 bits have."""
    node = restore
    while node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear", *MOVES):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Clip" or len(node.inputs) < 3:
        return False
    known: list[Any] = [
        None if value is None else ir_constant(value) for value in (*node.inputs[1:3], restore.inputs[1])
    ]
    if any(array is None for array in known):
        return False
    low, high, scale = (float(array.max()) for array in known)
    return (high - low) / scale < _EIGHT_BITS


_MOVED, _LEVELS, _EIGHT_BITS = 0.01, 4.0, 250
"""Share of an output's spread that rounding its bias may move it by; spread of inputs of 4 bits, in levels; steps that
inputs of 8 bits have at least."""


def _spread(gemm: Any, weight: Any) -> Any:
    """Return how far each output of a linear layer spreads at least, in steps of its bias, if inputs have 4 bits."""
    transposed = gemm.attributes.get("transB")
    rows = weight.inputs[0].const_value.numpy().astype(np.float64)
    rows = rows if transposed is not None and transposed.as_int() else rows.T
    return _LEVELS * np.linalg.norm(rows, axis=1)


def _initializer(graph: Any, name: str, array: Any) -> Any:
    """Return a new constant of the graph."""
    ir = require("onnx_ir", "onnx")
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def store_four_bits(graph: Any) -> None:
    """Store each int8 weight whose values 4 bits can hold in 4 bits, its zero points too."""
    ir = require("onnx_ir", "onnx")
    types = require("ml_dtypes", "onnx")
    for node in graph:
        if node.op_type != "DequantizeLinear" or not node.inputs[0].is_initializer():
            continue
        weight, zero_point = node.inputs[0], node.inputs[2]
        values, zeros = weight.const_value.numpy(), zero_point.const_value.numpy()
        if values.dtype != np.int8 or values.min() < -8 or values.max() > 7 or zeros.any():
            continue
        for place, old, array in ((0, weight, values), (2, zero_point, zeros)):
            tensor = ir.Tensor(array.astype(types.int4), dtype=ir.DataType.INT4, name=f"{old.name}_int4")
            made = graph.initializers.get(tensor.name)
            if made is None:
                made = ir.Value(name=tensor.name, shape=old.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
                graph.register_initializer(made)
            node.replace_input_with(place, made)


def remove_unused(graph: Any) -> None:
    """Remove constants that nothing reads any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
