"""Which mantissa bits a tensor's weights do without, as those of BF16 files do that were FP8 or FP4."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = 7


def zero_low_bits(weight: Tensor) -> int:
    """Low mantissa bits, 0 … 7, that are zero in every weight of a bf16 tensor in host memory, of any shape."""
    bits = weight.detach().contiguous().view(torch.int16).numpy().reshape(-1)
    used = int(np.bitwise_or.reduce(bits)) | 1 << MANTISSA_BITS
    return (used & -used).bit_length() - 1
