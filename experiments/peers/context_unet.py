"""The ContextUnet in PyTorch, written from its description, for tests and the benchmark.

Images are NCHW. The published network takes heights 16 to 28, and init_conv draws a new random
shortcut at every call. Here the shortcut is left out ("none") or is a normal layer ("conv"), the
window of the pool is height / 4 at other heights, and GroupNorm can replace BatchNorm.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]


class ResidualConvBlock(nn.Module):
    """Two sequences of convolution, norm and GELU. is_res adds the input and divides by 1.414."""

    def __init__(
        self, inputs: int, outputs: int, norm: MakeNorm, is_res: bool = False, shortcut: str = ""
    ) -> None:
        """Make the layers. The shortcut "conv" is one more, from input to output channels."""
        super().__init__()
        self.is_res, self.same = is_res, inputs == outputs
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), norm(outputs), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), norm(outputs), nn.GELU())
        learned = shortcut == "conv" and not self.same
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channel, height, width)."""
        h = self.conv2(self.conv1(x))
        if not self.is_res:
            return h
        if self.same:
            return (x + h) / 1.414
        return h / 1.414 if self.shortcut is None else (self.shortcut(x) + h) / 1.414


def model(*layers: nn.Module) -> nn.Module:
    """Return layers in sequence, with weights named model.0, model.1, ..."""
    return nn.Sequential(OrderedDict(model=nn.Sequential(*layers)))


def unet_down(inputs: int, outputs: int, norm: MakeNorm) -> nn.Module:
    """Return two blocks and max pooling, which halve the height and width."""
    first = ResidualConvBlock(inputs, outputs, norm)
    return model(first, ResidualConvBlock(outputs, outputs, norm), nn.MaxPool2d(2))


def unet_up(inputs: int, outputs: int, norm: MakeNorm) -> nn.Module:
    """Return a transposed convolution and two blocks, which double the height and width."""
    blocks = [ResidualConvBlock(outputs, outputs, norm) for _ in range(2)]
    return model(nn.ConvTranspose2d(inputs, outputs, 2, 2), *blocks)


def embed_fc(inputs: int, outputs: int) -> nn.Module:
    """Return two linear layers with a GELU between them, from (..., inputs) to one pixel."""
    layers = nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
    return model(*layers, nn.Unflatten(1, (outputs, 1, 1)))


class ContextUnet(nn.Module):
    """A U-Net of two levels, conditioned on the time and on a context vector."""

    def __init__(
        self,
        in_channels: int = 3,
        n_feat: int = 64,
        n_cfeat: int = 5,
        height: int = 16,
        shortcut: str = "none",
        norm: str = "batch",
    ) -> None:
        """Make the layers. norm: "batch" or "group"."""
        super().__init__()
        n, self.n_cfeat = n_feat, n_cfeat
        make_norm: MakeNorm = nn.BatchNorm2d if norm == "batch" else lambda c: nn.GroupNorm(8, c)
        self.init_conv = ResidualConvBlock(in_channels, n, make_norm, True, shortcut)
        self.down1 = unet_down(n, n, make_norm)
        self.down2 = unet_down(n, 2 * n, make_norm)
        window = 4 if 16 <= height <= 28 else height // 4
        self.to_vec = nn.Sequential(nn.AvgPool2d(window), nn.GELU())
        self.timeembed1, self.timeembed2 = embed_fc(1, 2 * n), embed_fc(1, n)
        self.contextembed1, self.contextembed2 = embed_fc(n_cfeat, 2 * n), embed_fc(n_cfeat, n)
        quarter = height // 4
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * n, 2 * n, quarter, quarter), nn.GroupNorm(8, 2 * n), nn.ReLU()
        )
        self.up1, self.up2 = unet_up(4 * n, n, make_norm), unet_up(2 * n, n, make_norm)
        convs = nn.Conv2d(2 * n, n, 3, 1, 1), nn.Conv2d(n, in_channels, 3, 1, 1)
        self.out = nn.Sequential(convs[0], nn.GroupNorm(8, n), nn.ReLU(), convs[1])

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise of x (batch, channel, height, width). None is a context of zeros."""
        if context is None:
            context = x.new_zeros(x.shape[0], self.n_cfeat)
        t, first = t.view(-1, 1), self.init_conv(x)
        down1 = self.down1(first)
        down2 = self.down2(down1)
        up = self.up0(self.to_vec(down2))
        up = self.contextembed1(context) * up + self.timeembed1(t)
        up = self.up1(torch.cat((up, down2), 1))
        up = self.contextembed2(context) * up + self.timeembed2(t)
        up = self.up2(torch.cat((up, down1), 1))
        return self.out(torch.cat((up, first), 1))
