"""Soft weight sharing: a mixture prior that draws weights together while they train."""

from lightning_compress.quantization.soft_sharing.callbacks import SoftWeightSharing

__all__ = ["SoftWeightSharing"]
