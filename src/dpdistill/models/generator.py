"""A small conditional image generator without batch statistics, for DP-MERF.

Source: after the generator of Harder et al. (2021): a linear layer, then two times upsampling and convolution.
B images, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .default_weights import draw_weights


class Generator(nn.Module):
    """Maps latents [B, latent] and one-hot classes [B, K] to images [B, C, H, W] in (-1, 1).

    Args:
      generator: of the weights (PyTorch's default distributions). The global random state is left alone.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        latent: int = 10,
        width: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        self.size = (height, width_px)
        self.seed_shape = (width, -(-height // 4), -(-width_px // 4))
        hidden = 4 * width
        n_seed = width * self.seed_shape[1] * self.seed_shape[2]
        self.first = nn.utils.skip_init(nn.Linear, latent + n_classes, hidden)
        self.second = nn.utils.skip_init(nn.Linear, hidden, n_seed)
        self.third = nn.utils.skip_init(nn.Conv2d, width, width // 2 or 1, 5, padding=2)
        self.fourth = nn.utils.skip_init(nn.Conv2d, width // 2 or 1, channels, 5, padding=2)
        draw_weights(self, generator)

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        hidden = F.relu(self.first(torch.cat([z, classes], dim=1)))
        x = F.relu(self.second(hidden)).view(-1, *self.seed_shape)
        x = F.relu(self.third(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        x = self.fourth(F.interpolate(x, size=self.size, mode="bilinear", align_corners=False))
        return torch.tanh(x)
