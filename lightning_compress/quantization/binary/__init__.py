"""Weights of two or three values: BinaryConnect, BinaryNet, XNOR-Net, loss-aware binarization, ternary weights."""
