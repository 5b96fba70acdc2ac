"""Settings for the whole test run."""

import torch

torch.set_num_threads(1)  # tiny models are slower with more, and several test runs may share a machine
