"""What makes a student's features comparable with a teacher's: one small module a pair, built from shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError, did_you_mean

Features = Tensor | tuple[Tensor, ...]
"""One tensor, or one tensor a pair of taps."""


@contextmanager
def seeded_layers(seed: int) -> Iterator[None]:
    """Create layers on the CPU whose values depend on ``seed`` only, and leave every global random state as it was.

    >>> with seeded_layers(0):
    ...     one = nn.Linear(2, 2)
    >>> before = torch.get_rng_state()
    >>> with seeded_layers(0):
    ...     other = nn.Linear(2, 2)
    >>> torch.equal(one.weight, other.weight), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def as_tuple(features: Features) -> tuple[Tensor, ...]:
    """Return ``features`` as a tuple, also when there is one tensor only.

    >>> len(as_tuple(torch.zeros(2))), len(as_tuple((torch.zeros(2), torch.zeros(3))))
    (1, 2)
    """
    return (features,) if isinstance(features, Tensor) else tuple(features)


def constant(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its graph, and as one that autograd may keep if it was made in inference mode.

    >>> with torch.inference_mode():
    ...     made = torch.ones(1)
    >>> constant(made).is_inference()
    False
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class Adapters(nn.Module):
    """One adapter a pair on the student's side, and where a loss trains one there (CRD), on the teacher's side too.

    The teacher's features are detached before they reach a module here, so nothing flows back into the teacher.

    Args:
        student: A module or ``None`` (leave as it is) a pair.
        teacher: The same for the teacher's side; ``None`` for no module at all.

    >>> adapters = Adapters([nn.Linear(2, 3)])
    >>> student, teacher = adapters(torch.ones(4, 2), torch.ones(4, 3))
    >>> student.shape, teacher.shape
    (torch.Size([4, 3]), torch.Size([4, 3]))
    """

    def __init__(self, student: Sequence[nn.Module | None], teacher: Sequence[nn.Module | None] | None = None) -> None:
        super().__init__()
        other = [None] * len(student) if teacher is None else teacher
        self.student = nn.ModuleList(nn.Identity() if part is None else part for part in student)
        self.teacher = nn.ModuleList(nn.Identity() if part is None else part for part in other)

    def forward(self, student: Features, teacher: Features) -> tuple[Features, Features]:
        """Return both sides' features after their adapters: tensors for tensors, tuples for tuples."""
        ours = tuple(module(part) for module, part in zip(self.student, as_tuple(student), strict=True))
        theirs = tuple(module(constant(part)) for module, part in zip(self.teacher, as_tuple(teacher), strict=True))
        return (
            ours[0] if isinstance(student, Tensor) else ours,
            theirs[0] if isinstance(teacher, Tensor) else theirs,
        )


_POOL: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_LINEAR = ("linear", "bilinear", "trilinear")
_CONV: tuple[Callable[..., nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM: tuple[Callable[..., nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps of another size: averages where they shrink, linear interpolation where they grow.

    Args:
        features: ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        size: What comes after the channels.

    Returns:
        ``(N, C, *size)``; ``features`` itself if that is its size.

    Raises:
        ConfigurationError: For another number of dimensions, or a size of 0.

    >>> resize(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
    tensor([[[2., 6.]]])
    >>> resize(torch.tensor([[[2.0, 6.0]]]), (4,))
    tensor([[[2., 3., 5., 6.]]])
    """
    have, want = tuple(features.shape[2:]), tuple(size)
    if have == want:
        return features
    if len(have) != len(want) or not 1 <= len(have) <= 3:
        raise ConfigurationError(
            f"features of shape {tuple(features.shape)} cannot be resized to {want}: one to three dimensions after "
            "the channels, as many on both sides; pool them in the model, or tap other layers"
        )
    if min(want) < 1 or min(have) < 1:
        raise ConfigurationError(f"a size must be at least 1 everywhere; cannot resize {have} to {want}")
    if any(new > old for old, new in zip(have, want, strict=True)):
        return F.interpolate(features, want, mode=_LINEAR[len(have) - 1], align_corners=False)
    if all(old % new == 0 for old, new in zip(have, want, strict=True)):
        kernel = [old // new for old, new in zip(have, want, strict=True)]
        return _POOL[len(have) - 1](features, kernel)  # the adaptive kind has no deterministic gradient on CUDA
    return _ADAPTIVE[len(have) - 1](features, want)


def resize_like(features: Tensor, reference: Tensor, channel_dim: int = 1) -> Tensor:
    """Return ``features`` in the size of ``reference``, whatever their channels, see :func:`resize`.

    Args:
        features: ``(N, C, ...)``, or ``(N, ..., C)`` for ``channel_dim`` -1.
        reference: As many dimensions; only its shape counts.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Raises:
        ConfigurationError: If they cannot be resized.

    >>> resize_like(torch.zeros(2, 49, 8), torch.zeros(2, 196, 16), channel_dim=-1).shape
    torch.Size([2, 196, 8])
    """
    size = reference.movedim(channel_dim, 1).shape[2:]
    return resize(features.movedim(channel_dim, 1), size).movedim(1, channel_dim)


class Regressor(nn.Module):
    """Maps a student's channels to a teacher's, for hints (Romero et al. 2015, FitNets, arXiv 1412.6550).

    A linear layer for ``(N, C)``, a convolution for everything else. The default, of size 1, leaves the spatial size
    to :func:`resize_like`, so that inputs of changing size work; ``valid`` is the paper's: a kernel just large enough
    that the student's maps come out in the teacher's size.

    Args:
        student: Shape of the student's feature, batch first.
        teacher: Shape of the teacher's.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.
        kernel: ``pointwise`` or ``valid``.
        batch_norm: Normalize the result; in training mode this needs more than one value a channel.

    Raises:
        ConfigurationError: For shapes with another number of dimensions, another word for ``kernel``, or ``valid``
            with a student that is smaller.

    >>> Regressor((2, 8, 6, 6), (2, 16, 4, 4), kernel="valid")(torch.zeros(2, 8, 6, 6)).shape
    torch.Size([2, 16, 4, 4])
    >>> Regressor((2, 49, 8), (2, 196, 16), channel_dim=-1)(torch.zeros(2, 49, 8)).shape
    torch.Size([2, 49, 16])
    """

    def __init__(
        self,
        student: Sequence[int],
        teacher: Sequence[int],
        channel_dim: int = 1,
        kernel: Literal["pointwise", "valid"] = "pointwise",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_dimensions(student, teacher, "`Regressor`")
        if kernel not in ("pointwise", "valid"):
            raise ConfigurationError(f"`kernel` is {kernel!r}: {did_you_mean(str(kernel), ('pointwise', 'valid'))}")
        ours, theirs = (_channels_first(shape, channel_dim) for shape in (student, teacher))
        spatial = len(ours) - 2
        size = [1] * spatial
        if kernel == "valid":
            size = [one - other + 1 for one, other in zip(ours[2:], theirs[2:], strict=True)]
            if min(size, default=1) < 1:
                raise ConfigurationError(
                    f"`kernel` 'valid' makes maps smaller, but the student gives {tuple(student)} and the teacher "
                    f"{tuple(teacher)}; use kernel='pointwise', which resizes"
                )
        options = {"kernel_size": size} if spatial else {}
        self.channel_dim = channel_dim
        self.project = _CONV[spatial](ours[1], theirs[1], bias=not batch_norm, **options)
        self.norm = _NORM[spatial](theirs[1]) if batch_norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return features with the teacher's channels."""
        return self.norm(self.project(features.movedim(self.channel_dim, 1))).movedim(1, self.channel_dim)


def check_dimensions(student: Sequence[int], teacher: Sequence[int], where: str, least: int = 2) -> None:
    """Refuse features that differ in kind: another number of dimensions, or one that is not ``least`` to 5.

    Raises:
        ConfigurationError: With the shapes.
    """
    if len(student) != len(teacher) or not least <= len(student) <= 5:
        raise ConfigurationError(
            f"{where}: the student gives {tuple(student)} and the teacher {tuple(teacher)}; they need {least} to 5 "
            "dimensions, as many on both sides; tap layers of the same kind"
        )


def _channels_first(shape: Sequence[int], channel_dim: int) -> list[int]:
    first = list(shape)
    first.insert(1, first.pop(channel_dim))
    return first
