"""The devices that a test of waiting runs on."""

import pytest
import torch
from pretended_device import DEVICE

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [str(DEVICE), pytest.param("cuda", marks=ON_GPU)]
