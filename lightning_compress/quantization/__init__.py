"""Quantization: layers that compute with few bits while they train, and what turns them into integers.

The interface that other parts of this package build on, bottom up:

- :mod:`~lightning_compress.quantization.affine`: pure functions. An integer q stands for (q - zero_point) * scale.
- :class:`~lightning_compress.quantization.spec.QuantizerSpec`: bits, symmetry, granularity and range, JSON-able.
- :class:`~lightning_compress.quantization.quantizer.Quantizer`: a module with the buffers ``scale`` and ``zero_point``,
  ``spec``, ``bounds`` and ``axis``. ``scale, zero_point = q.affine(x)`` are the values in use (a weight's range follows
  the weight itself, so give it), ``q.quantize(x)`` the integers, ``q.set_range(scale, zero_point)`` fixes a range.
  The flags ``enabled``, ``observing`` and ``ready`` are plain attributes and travel in the ``state_dict``.
- :class:`~lightning_compress.quantization.quantizer.ActivationQuantizer` notes extremes while it and its flag
  ``observing`` are in train mode; ``update_ranges(quantizers)``, once a step or once after calibration, joins the notes
  of all processes and sets the ranges. To calibrate a model in eval mode: ``for q in quantizers_of(model): q.train()``.
- :func:`~lightning_compress.quantization.layers.quantize_layer` (replace kind ``quantized``, config ``weight`` and
  ``input``): a layer becomes e.g. a ``QuantizedConv2d``, in place: the same object, Parameter and key, and the children
  ``weight_quantizer`` and ``input_quantizer``, either of which may be ``None``. Recurrent layers and attention have
  several weights and ``weight_quantizers``; ``weight_quantizers_of(layer)`` answers for all kinds.
- :func:`~lightning_compress.quantization.outputs.quantize_output` and ``quantize_input`` (kinds ``quantized_output``,
  ``quantized_input``, config: the spec's arguments): the same for what any module returns or gets, by a hook.
- Learned ranges (LSQ, LSQ+, PACT) are subclasses with a Parameter ``scale`` (``offset``, ``bound``); ``affine`` answers
  for them too. A weight that DoReFa squeezes has the integers and the scale of the squeezed weight.
- :mod:`~lightning_compress.quantization.calls`: what each layer computes, with a weight that is not its own.
- :func:`~lightning_compress.quantization.placement.place_quantizers`: which module outputs and inputs need quantizers.
- :func:`~lightning_compress.quantization.convert.convert`: integers in place of float weights, batch norms folded.
"""

from lightning_compress.quantization.attention import QuantizedMultiheadAttention
from lightning_compress.quantization.convert import Conversion, convert, convert_in_place, is_quantized
from lightning_compress.quantization.integer import IntegerLayer
from lightning_compress.quantization.layers import QuantizedLayer, quantize_layer, weight_quantizers_of
from lightning_compress.quantization.outputs import quantize_input, quantize_output
from lightning_compress.quantization.placement import Placement, Point, place_quantizers
from lightning_compress.quantization.quantizer import (
    ActivationQuantizer,
    Quantizer,
    WeightQuantizer,
    quantizers_of,
    update_ranges,
)
from lightning_compress.quantization.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN
from lightning_compress.quantization.spec import ACTIVATION, WEIGHT, QuantizerSpec

__all__ = [
    "ACTIVATION",
    "WEIGHT",
    "ActivationQuantizer",
    "Conversion",
    "IntegerLayer",
    "Placement",
    "Point",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedLayer",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "Quantizer",
    "QuantizerSpec",
    "WeightQuantizer",
    "convert",
    "convert_in_place",
    "is_quantized",
    "place_quantizers",
    "quantize_input",
    "quantize_layer",
    "quantize_output",
    "quantizers_of",
    "update_ranges",
    "weight_quantizers_of",
]
