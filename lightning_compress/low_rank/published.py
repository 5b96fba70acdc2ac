"""Ranks that Tai et al. published (arXiv 1511.06067), which the survey's Table II was made with."""

CAFFENET_RANKS = (8, 40, 60, 100, 200)
"""Spatial SVD of CaffeNet's five convolutions, counted over all groups: 2,332,704 weights become 466,312."""

VGG16_RANKS = (5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320)
"""Spatial SVD of the thirteen convolutions of VGG-16: 14,710,464 weights become 5,358,573."""
