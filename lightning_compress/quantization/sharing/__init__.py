"""Weight sharing: few values for many weights, found by clustering and trained on as one."""

from lightning_compress.quantization.sharing.callbacks import WeightSharing
from lightning_compress.quantization.sharing.importance import Fisher
from lightning_compress.quantization.sharing.quantizers import EntropyConstrained, KMeans, Uniform
from lightning_compress.quantization.sharing.rates import sharing_rate
from lightning_compress.quantization.sharing.rules import SharingRule

__all__ = ["EntropyConstrained", "Fisher", "KMeans", "SharingRule", "Uniform", "WeightSharing", "sharing_rate"]
