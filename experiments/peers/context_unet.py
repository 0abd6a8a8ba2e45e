"""The ContextUnet in PyTorch, written from its description: the oracle of the parity tests, and
the peer of the benchmark.

NCHW. As published it takes heights 16 to 28 and draws a fresh random shortcut of init_conv at
every call; here the shortcut is left out ("none") or a layer like any other ("conv"), the pool's
window is height / 4 at other heights, and GroupNorm may stand in for BatchNorm.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]


class ResidualConvBlock(nn.Module):
    """Twice convolution, norm and GELU; is_res adds the input and divides by 1.414."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: MakeNorm,
        is_res: bool = False,
        shortcut: str = "none",
    ) -> None:
        """Make the layers; shortcut: "none" or "conv", where the channels change."""
        super().__init__()
        self.is_res, self.same = is_res, inputs == outputs
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), norm(outputs), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), norm(outputs), nn.GELU())
        learned = shortcut == "conv" and not self.same
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channel, height, width)."""
        h = self.conv2(self.conv1(x))
        if not self.is_res:
            return h
        if self.same:
            return (x + h) / 1.414
        return h / 1.414 if self.shortcut is None else (self.shortcut(x) + h) / 1.414


class UnetDown(nn.Module):
    """Two blocks and max pooling: half the height and width."""

    def __init__(self, inputs: int, outputs: int, norm: MakeNorm) -> None:
        """Make the layers."""
        super().__init__()
        self.model = nn.Sequential(
            ResidualConvBlock(inputs, outputs, norm),
            ResidualConvBlock(outputs, outputs, norm),
            nn.MaxPool2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channel, height, width)."""
        return self.model(x)


class UnetUp(nn.Module):
    """Transposed convolution and two blocks, of the input beside what was skipped."""

    def __init__(self, inputs: int, outputs: int, norm: MakeNorm) -> None:
        """Make the layers."""
        super().__init__()
        self.model = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 2, 2),
            ResidualConvBlock(outputs, outputs, norm),
            ResidualConvBlock(outputs, outputs, norm),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map two of (batch, channel, height, width) to twice the height and width."""
        return self.model(torch.cat((x, skip), 1))


class EmbedFC(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Make the layers."""
        super().__init__()
        self.inputs = inputs
        self.model = nn.Sequential(
            nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors to (batch, outputs, 1, 1)."""
        return self.model(x.view(-1, self.inputs))[:, :, None, None]


class ContextUnet(nn.Module):
    """U-Net of two levels, conditioned on the time and on a context vector."""

    def __init__(
        self,
        in_channels: int = 3,
        n_feat: int = 64,
        n_cfeat: int = 5,
        height: int = 16,
        shortcut: str = "none",
        norm: str = "batch",
    ) -> None:
        """Make the layers; norm: "batch" or "group"."""
        super().__init__()
        n, self.n_cfeat = n_feat, n_cfeat
        make_norm: MakeNorm = nn.BatchNorm2d if norm == "batch" else lambda c: nn.GroupNorm(8, c)
        self.init_conv = ResidualConvBlock(in_channels, n, make_norm, True, shortcut)
        self.down1 = UnetDown(n, n, make_norm)
        self.down2 = UnetDown(n, 2 * n, make_norm)
        window = 4 if 16 <= height <= 28 else height // 4
        self.to_vec = nn.Sequential(nn.AvgPool2d(window), nn.GELU())
        self.timeembed1 = EmbedFC(1, 2 * n)
        self.timeembed2 = EmbedFC(1, n)
        self.contextembed1 = EmbedFC(n_cfeat, 2 * n)
        self.contextembed2 = EmbedFC(n_cfeat, n)
        quarter = height // 4
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * n, 2 * n, quarter, quarter), nn.GroupNorm(8, 2 * n), nn.ReLU()
        )
        self.up1 = UnetUp(4 * n, n, make_norm)
        self.up2 = UnetUp(2 * n, n, make_norm)
        self.out = nn.Sequential(
            nn.Conv2d(2 * n, n, 3, 1, 1),
            nn.GroupNorm(8, n),
            nn.ReLU(),
            nn.Conv2d(n, in_channels, 3, 1, 1),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise of x (batch, channel, height, width); None is a context of zeros."""
        if context is None:
            context = x.new_zeros(x.shape[0], self.n_cfeat)
        first = self.init_conv(x)
        down1 = self.down1(first)
        down2 = self.down2(down1)
        up = self.up0(self.to_vec(down2))
        up = self.up1(self.contextembed1(context) * up + self.timeembed1(t), down2)
        up = self.up2(self.contextembed2(context) * up + self.timeembed2(t), down1)
        return self.out(torch.cat((up, first), 1))
