"""The conditional image generator of data-free distillation: no batch statistics, so each image depends on its own latent only.

Source: the shape of DAFL's generator (Chen et al. 2019) — a linear layer, twice upsampling and convolution, tanh — with
GroupNorm for BatchNorm and the class as a part of the input. Nothing here is private.
B images, K classes, C channels, H, W size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .default_weights import draw_weights


class StudentGenerator(nn.Module):
    """Maps latents [B, latent] and class numbers [B] to images [B, C, H, W] in (-1, 1).

    Args:
      width: channels at full size; twice as many at half and quarter size.
      generator: of the weights (PyTorch's default distributions), a CPU one. The global random state is left alone.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        latent: int = 64,
        width: int = 32,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        self.n_classes, self.latent = n_classes, latent
        self.config = {"image_shape": list(image_shape), "n_classes": n_classes, "latent": latent, "width": width}
        self.size, self.half = (height, width_px), (-(-height // 2), -(-width_px // 2))
        self.seed_shape = (2 * width, -(-height // 4), -(-width_px // 4))
        n_seed = self.seed_shape[0] * self.seed_shape[1] * self.seed_shape[2]
        self.first = nn.utils.skip_init(nn.Linear, latent + n_classes, n_seed)
        self.second = nn.utils.skip_init(nn.Conv2d, 2 * width, 2 * width, 3, padding=1)
        self.third = nn.utils.skip_init(nn.Conv2d, 2 * width, width, 3, padding=1)
        self.fourth = nn.utils.skip_init(nn.Conv2d, width, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, n) for n in (2 * width, 2 * width, width))
        draw_weights(self, generator)

    @staticmethod
    def shapes(
        image_shape: tuple[int, int, int], n_classes: int, *, latent: int, width: int
    ) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name, without making one."""
        channels, height, width_px = image_shape
        n_seed = 2 * width * -(-height // 4) * -(-width_px // 4)
        found: dict[str, tuple[int, ...]] = {"first.weight": (n_seed, latent + n_classes), "first.bias": (n_seed,)}
        sizes = (2 * width, 2 * width, width, channels)
        for name, n_in, n_out in zip(("second", "third", "fourth"), sizes, sizes[1:], strict=False):
            found |= {f"{name}.weight": (n_out, n_in, 3, 3), f"{name}.bias": (n_out,)}
        for number, n in enumerate(sizes[:3]):
            found |= {f"norms.{number}.weight": (n,), f"norms.{number}.bias": (n,)}
        return found

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        one_hot = F.one_hot(classes, self.n_classes).to(z.dtype)
        x = self.norms[0](self.first(torch.cat([z, one_hot], dim=1)).view(-1, *self.seed_shape))
        x = self.second(F.interpolate(x, size=self.half, mode="nearest"))
        x = self.third(F.interpolate(F.leaky_relu(self.norms[1](x), 0.2), size=self.size, mode="nearest"))
        return torch.tanh(2 * self.fourth(F.leaky_relu(self.norms[2](x), 0.2)))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns n random latents and classes; a CPU generator, the same numbers on any device."""
        z = torch.randn(n, self.latent, generator=generator)
        classes = torch.randint(self.n_classes, (n,), generator=generator)
        device = self.first.weight.device
        return z.to(device), classes.to(device)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns n images, and the classes that they were asked to be."""
        z, classes = self.draw(n, generator)
        return self(z, classes), classes
