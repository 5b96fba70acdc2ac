"""Whole heads of attention: which can go, and the module that stands in for attention with fewer of them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path
from lightning_compress.core.verbs import expand_ranges, register_kind
from lightning_compress.pruning.structured.groups import ChannelGroup, Touch

KIND = "head_attention"
"""Key of the ``replace`` edit that keeps some of the heads."""


class HeadAttention(nn.Module):
    r"""Self- or cross-attention with any number of heads, called like ``nn.MultiheadAttention``.

    :math:`\sum_h \mathrm{softmax}(q_h k_h^\top / \sqrt{d})\, v_h W_h + b`: without a head, its term is missing, while
    the width of inputs and outputs stays. ``nn.MultiheadAttention`` cannot do that: its heads fill the width exactly.

    Args:
        embed_dim: Width of inputs and outputs.
        num_heads: Number of heads, at least 1.
        head_dim: Width of each head.
        dropout: Share of attention weights that is dropped in training.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are (batch, length, width), not (length, batch, width).
        device, dtype: Of the parameters.

    >>> HeadAttention(8, 3, 4, batch_first=True)(*[torch.zeros(2, 5, 8)] * 3)[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.in_proj = nn.Linear(embed_dim, 3 * num_heads * head_dim, bias, device, dtype)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, device, dtype)

    @property
    def in_proj_bias(self) -> None:
        """Nothing: torch's encoder layers then leave out their fused kernel, which wants whole attention."""
        return None

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
        """Attend; arguments, shapes and results as in ``nn.MultiheadAttention``, weights of the heads that are left."""
        single = query.dim() == 2
        first = 0 if single else 1 if not self.batch_first else None
        q, k, v = (self._split(t, first) for t in self._project(query, key, value))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropped = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropped)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out.squeeze(0) if single else out if self.batch_first else out.transpose(0, 1)
        return out, weights.squeeze(0) if single and weights is not None else weights

    def extra_repr(self) -> str:
        """Return the numbers of heads and their width."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        weights = self.in_proj.weight.chunk(3)
        biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _split(self, projected: Tensor, first: int | None) -> Tensor:
        """Return (batch, heads, length, head width)."""
        batched = projected.unsqueeze(0) if first == 0 else projected.transpose(0, 1) if first == 1 else projected
        return batched.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        found = None
        for mask, rank in ((attn_mask, 2), (padding, 1)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if rank == 1:
                mask = mask.reshape(-1, 1, 1, k.shape[2])
            elif mask.dim() == 3 and mask.shape[0] != q.shape[0] * self.num_heads:
                raise ConfigurationError(
                    f"`attn_mask` has {mask.shape[0]} masks, one for each sample and head of the whole attention, but "
                    f"{self.num_heads} heads are left; pass one mask for all of them, of {q.shape[2]} x {k.shape[2]}"
                )
            else:
                mask = mask.reshape(-1, self.num_heads if mask.dim() == 3 else 1, q.shape[2], k.shape[2])
            found = mask if found is None else found + mask
        return found


ATTENTION: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, HeadAttention)
"""Types whose heads can go."""


@register_kind("replace", KIND)
def keep_heads(layer: nn.Module, heads: list[int | list[int]]) -> nn.Module:
    """Return attention with only the given heads of ``layer``, with their weights.

    Args:
        layer: ``nn.MultiheadAttention`` or :class:`HeadAttention`.
        heads: Numbers of the heads that stay, runs as ``[first, last]``.

    Raises:
        ConfigurationError: If the layer is not attention, or the numbers do not rise or are not those of heads.

    >>> keep_heads(nn.MultiheadAttention(8, 4), [0, [2, 3]])
    HeadAttention(
      8, num_heads=3, head_dim=2
      (in_proj): Linear(in_features=8, out_features=18, bias=True)
      (out_proj): Linear(in_features=6, out_features=8, bias=True)
    )
    """
    if not isinstance(layer, nn.MultiheadAttention | HeadAttention):
        raise ConfigurationError(f"heads can be kept of attention only, not of {type(layer).__name__}")
    _check_heads(heads, int(layer.num_heads))
    weight: Tensor = layer.in_proj.weight if isinstance(layer, HeadAttention) else layer.in_proj_weight
    bias: Tensor | None = layer.in_proj.bias if isinstance(layer, HeadAttention) else layer.in_proj_bias
    kept = torch.tensor(expand_ranges(heads), device=weight.device)
    new = HeadAttention(
        layer.embed_dim, len(kept), layer.head_dim, layer.dropout, bias is not None, layer.batch_first, "meta"
    )

    def pick(tensor: Tensor, dim: int, parts: int) -> nn.Parameter:
        split = tensor.detach().unflatten(dim, (parts, layer.num_heads, layer.head_dim))
        picked = split.index_select(dim + 1, kept).flatten(dim, dim + 2)
        return nn.Parameter(picked.clone(), requires_grad=tensor.requires_grad)

    new.in_proj.weight = pick(weight, 0, 3)
    new.out_proj.weight = pick(layer.out_proj.weight, 1, 1)
    if bias is not None:
        new.in_proj.bias, new.out_proj.bias = pick(bias, 0, 3), layer.out_proj.bias
    return new


def _check_heads(heads: list[int | list[int]], count: int) -> None:
    bounds = [bound for item in heads for bound in ((item, item) if isinstance(item, int) else item)]
    rising = all(one <= other for one, other in pairwise(bounds)) and len(bounds) == 2 * len(heads)
    apart = all(last < first for last, first in zip(bounds[1:-1:2], bounds[2::2], strict=True))
    if not bounds or not rising or not apart or bounds[0] < 0 or bounds[-1] >= count:
        raise ConfigurationError(f"`heads` that stay must rise and lie in 0..{count - 1}, got {str(heads)[:80]}")


def head_groups(model: nn.Module, called: set[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return a group of heads for each attention, and why others keep all of theirs.

    Args:
        model: Any module.
        called: Paths of the modules that ran on the example inputs.

    >>> groups, left = head_groups(nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 1)), {"0", "1"})
    >>> groups[0].channels, left
    (2, {'1': 'it has one head'})
    """
    groups, left = [], {}
    packed = _packed(model)
    for real, module in model.named_modules():
        path = clean_path(real)
        if not path or not isinstance(module, nn.MultiheadAttention | HeadAttention):
            continue
        why = "the model does not call it when it runs on the example inputs" if path not in called else ""
        why = why or _whole(module) or packed.get(id(module), "")
        if why:
            left[path] = why
        else:
            groups.append(_heads_of(path, module))
    return groups, left


def _heads_of(path: str, layer: nn.MultiheadAttention | HeadAttention) -> ChannelGroup:
    rebuilt = isinstance(layer, HeadAttention)
    owner, prefix = (f"{path}.in_proj", "") if rebuilt else (path, "in_proj_")
    biases = (f"{prefix}bias",) if layer.out_proj.bias is not None else ()
    tensors = tuple((name, 0) for name in (f"{prefix}weight", *biases))
    width = layer.num_heads * layer.head_dim
    ins, outs = tuple(range(3 * width)), tuple(range(width))
    touches = (
        Touch(path, (), (), (), 0, (), True),
        Touch(owner, tensors, ins, tuple(i % width // layer.head_dim for i in ins), 3 * width, (), True),
        Touch(f"{path}.out_proj", (("weight", 1),), outs, tuple(i // layer.head_dim for i in outs), width),
    )
    return ChannelGroup(path, layer.num_heads, touches, (path, KIND))


def _whole(layer: nn.MultiheadAttention | HeadAttention) -> str:
    """Return why no head of an attention can go."""
    if layer.num_heads < 2:
        return "it has one head"
    parts = (layer, *layer.children())
    if any(parametrize.is_parametrized(part) for part in parts):
        return "its tensors are parametrized"
    if isinstance(layer, HeadAttention):
        return ""
    if type(layer) is not nn.MultiheadAttention:
        return f"{type(layer).__name__} computes attention in a way of its own"
    if layer.in_proj_weight is None:
        return "its keys or values have a width of their own (kdim, vdim)"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds keys and values of its own (add_bias_kv, add_zero_attn)"
    return ""


def _packed(model: nn.Module) -> dict[int, str]:
    """Return the attention in encoders that pack padded sequences, for which torch wants it whole."""
    why = "its encoder packs padded sequences, which takes whole attention; build it with enable_nested_tensor=False"
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    packing = [encoder for encoder in encoders if getattr(encoder, "use_nested_tensor", False)]
    return {id(part): why for encoder in packing for part in encoder.modules() if isinstance(part, ATTENTION)}
