"""Multi-head attention with quantized inputs and projections.

Queries, keys and values are quantized as they come in, and so are the weights of all four projections. Scores,
softmax, and what enters the last projection stay float, as they live inside one function of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.layers import CLASSES, ManyWeights
from lightning_compress.quantization.learned import attach


def attend(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Mapping[str, Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return ``layer(query, key, value, **options)`` with other projection weights.

    Args:
        layer: The attention.
        query: As for the layer.
        key: As for the layer.
        value: As for the layer.
        weights: By name: ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``; and
            ``out_proj``.
        options: ``key_padding_mask``, ``need_weights``, ``attn_mask``, ``average_attn_weights``, ``is_causal``.

    >>> import torch
    >>> layer, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
    >>> weights = {"in_proj_weight": layer.in_proj_weight, "out_proj": layer.out_proj.weight}
    >>> torch.equal(attend(layer, x, x, x, weights)[0], layer(x, x, x)[0])
    True
    """
    swap = layer.batch_first and query.dim() == 3
    if swap:
        same_key, same_value = key is query, value is key
        query = query.transpose(1, 0)
        key = query if same_key else key.transpose(1, 0)
        value = key if same_value else value.transpose(1, 0)
    separate: dict[str, Any] = {name: weights[name] for name in SEPARATE if name in weights}
    output, scores = F.multi_head_attention_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        cast(Any, weights.get("in_proj_weight")),
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        weights["out_proj"],
        layer.out_proj.bias,
        training=layer.training,
        use_separate_proj_weight=bool(separate),
        **separate,
        **options,
    )
    return (output.transpose(1, 0) if swap else output), scores


SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Names of the projections of an attention whose keys or values have a size of their own."""


def projections_of(layer: nn.MultiheadAttention) -> list[str]:
    """Return the names of the weights of an attention's projections; ``out_proj`` stands for ``out_proj.weight``.

    >>> projections_of(nn.MultiheadAttention(4, 2))
    ['in_proj_weight', 'out_proj']
    """
    return [*([*SEPARATE] if layer.in_proj_weight is None else ["in_proj_weight"]), "out_proj"]


class QuantizedMultiheadAttention(ManyWeights, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with fake-quantized inputs and projections."""

    key_quantizer: nn.Module | None
    value_quantizer: nn.Module | None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values, and the attention weights if they are asked for."""
        q = attach(self.quantized_input(query), *self._unused(query, key, value))
        k = q if key is query else key if self.key_quantizer is None else self.key_quantizer(key)
        known = q if value is query else k if value is key else None
        v = known if known is not None else value if self.value_quantizer is None else self.value_quantizer(value)
        weights = {name: self.quantized(name) for name in projections_of(self)}
        return attend(
            self,
            q,
            k,
            v,
            weights,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _unused(self, query: Tensor, key: Tensor, value: Tensor) -> list[nn.Parameter]:
        """Return learned ranges of quantizers that this call does without, which stay in the graph all the same."""
        idle = [self.key_quantizer] if key is query else []
        idle += [self.value_quantizer] if value is query or value is key else []
        return [p for quantizer in idle if quantizer is not None for p in quantizer.parameters()]


@register_kind("replace", "padded_encoder")
def keep_padded(encoder: nn.TransformerEncoder) -> nn.TransformerEncoder:
    """Let an encoder pass padded batches on as they are, in place: nested tensors reach only torch's float fast path.

    >>> keep_padded(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 1)).use_nested_tensor
    False
    """
    encoder.use_nested_tensor = False
    return encoder


CLASSES[nn.MultiheadAttention] = QuantizedMultiheadAttention
