"""Networks that recipes and tests use, and a LightningModule to train them."""

from lightning_compress.models.classifier import ImageClassifier
from lightning_compress.models.digits import DigitsCNN
from lightning_compress.models.imagenet import VGG16, CaffeNet
from lightning_compress.models.lenet import LeNet5, LeNet300100
from lightning_compress.models.perceptron import Perceptron
from lightning_compress.models.resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56
from lightning_compress.models.staged import StagedCNN
from lightning_compress.models.zoo import torchvision_model

__all__ = [
    "VGG16",
    "CaffeNet",
    "CifarResNet",
    "DigitsCNN",
    "ImageClassifier",
    "LeNet5",
    "LeNet300100",
    "Perceptron",
    "StagedCNN",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "torchvision_model",
]
