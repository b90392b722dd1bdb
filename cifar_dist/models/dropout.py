"""Dropout whose mask is cheap to draw on a CPU."""

import torch
from torch import nn

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU each element of the mask comes from 16 random bits, four to a draw of torch's generator.

    torch draws one value per element, in one thread, which took a fifth of a training step of Fan on two cores. The
    probability is rounded to 1/65536, and what is kept is scaled by the rounded one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_dropped = round(self.p * LEVELS)
        plain = not self.training or x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not 0 < num_dropped < LEVELS:
            return super().forward(x)
        random = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = random.view(torch.int16)[: x.numel()] >= num_dropped - LEVELS // 2
        mask = torch.empty_like(x, dtype=torch.bool)  # dense, in the order of x's memory
        mask = kept.as_strided(mask.shape, mask.stride())
        return x * mask * (LEVELS / (LEVELS - num_dropped))
