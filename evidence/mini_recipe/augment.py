"""Augmentation of whole batches with tensor operations, which is fast enough to run at every training step."""

import math

import torch
import torch.nn.functional as F

LUMA = torch.tensor([0.299, 0.587, 0.114])


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    """Return random numbers, uniform between low and high: float32, (count,)."""
    return torch.rand(count) * (high - low) + low


def shaped(images: torch.Tensor, may_flip: torch.Tensor, wobble: torch.Tensor, size: int) -> torch.Tensor:
    """Apply a random scale, shift, rotation, aspect ratio and flip, and a smooth distortion of the image plane.

    Args:
        images: premultiplied RGBA in 0..1, float32, (batch, 4, height, width).
        may_flip: whether an image may be mirrored: bool, (batch,).
        wobble: strength of the distortion, as a fraction of half the image; float32, (batch,).
        size: side of the result in pixels.

    Returns:
        float32, (batch, 4, size, size).
    """
    count = len(images)
    zoom, aspect, angle = uniform(count, 0.72, 1.12), uniform(count, -0.14, 0.14).exp(), uniform(count, -0.22, 0.22)
    flip = torch.where(may_flip & (torch.rand(count) < 0.5), -1.0, 1.0)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    room = (1.15 - zoom).clamp(min=0.05)
    shift_x, shift_y = uniform(count, -1, 1) * room, uniform(count, -1, 1) * room
    rows = [cos * aspect * flip, -sin, shift_x, sin * flip, cos / aspect, shift_y]
    theta = torch.stack(rows, dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    bend = F.interpolate(torch.randn(count, 2, 4, 4), size=(size, size), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1) * wobble.view(-1, 1, 1, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def backgrounds(count: int, size: int) -> torch.Tensor:
    """Return random backgrounds: float32, (count, 3, size, size).

    Half of them are white, 10% black, 22% one colour, and 18% smooth noise.
    """
    choice = torch.rand(count)
    flat = torch.rand(count, 3)
    flat[choice < 0.60] = 0.0
    flat[choice < 0.50] = 1.0
    ground = flat.view(count, 3, 1, 1).expand(count, 3, size, size).clone()
    noisy = choice > 0.82
    low = torch.rand(int(noisy.sum()), 3, 4, 4)
    if len(low):
        ground[noisy] = F.interpolate(low, size=(size, size), mode="bilinear", align_corners=True)
    return ground


def inked(alpha: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """Colour one-ink drawings with a random ink that contrasts with the background.

    Args:
        alpha: opacity of the drawings: float32, (batch, 1, size, size).
        ground: backgrounds: float32, (batch, 3, size, size).

    Returns:
        Premultiplied colours, float32, (batch, 3, size, size).
    """
    light = (ground.mean(dim=(2, 3)) * LUMA).sum(dim=1, keepdim=True)  # (batch, 1)
    ink = torch.rand(len(alpha), 3)
    ink = torch.where(torch.rand(len(alpha), 1) < 0.4, (ink > 0.5).float().mean(dim=1, keepdim=True).round(), ink)
    ink = torch.where(light > 0.5, ink * 0.5 * light, 1 - (1 - ink) * 0.5 * (1 - light))
    return ink.view(-1, 3, 1, 1) * alpha


def coloured(images: torch.Tensor) -> torch.Tensor:
    """Change saturation, hue, contrast and brightness at random; make 12% of images grey and invert 3%.

    Args:
        images: float32 in 0..1, (batch, 3, size, size).
    """
    count = len(images)
    saturation, hue = uniform(count, 0.5, 1.5), uniform(count, -0.35, 0.35)
    saturation = torch.where(torch.rand(count) < 0.12, torch.zeros(()), saturation)
    # Hue rotates colours around the grey axis; saturation scales their distance from the grey of their luma.
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    grey = LUMA.expand(3, 3)
    turn = torch.eye(3) + hue.sin().view(-1, 1, 1) * axis + (1 - hue.cos()).view(-1, 1, 1) * (axis @ axis)
    matrix = grey + saturation.view(-1, 1, 1) * (turn - grey)
    images = torch.bmm(matrix, images.flatten(2)).view_as(images)
    gain, offset = uniform(count, 0.75, 1.25).view(-1, 1, 1, 1), uniform(count, -0.12, 0.12).view(-1, 1, 1, 1)
    images = ((images - 0.5) * gain + 0.5 + offset).clamp(0, 1)
    inverted = (torch.rand(count) < 0.03).view(-1, 1, 1, 1)
    return torch.where(inverted, 1 - images, images)


def roughened(images: torch.Tensor, blur_rate: torch.Tensor) -> torch.Tensor:
    """Blur some images by scaling them down to 8 to 24 pixels and up again; add noise to 20% of images.

    Args:
        images: float32 in 0..1, (batch, 3, size, size).
        blur_rate: probability of the blur; float32, (batch,).
    """
    count, size = len(images), images.shape[-1]
    blurred = torch.rand(count) < blur_rate
    small = torch.randint(8, 25, (count,))
    for side in small[blurred].unique().tolist():
        chosen = blurred & (small == side)
        low = F.interpolate(images[chosen], size=(side, side), mode="area")
        images[chosen] = F.interpolate(low, size=(size, size), mode="bicubic", align_corners=False)
    noisy = torch.rand(count) < 0.20
    grain = torch.randn(int(noisy.sum()), 3, size, size)
    images[noisy] += grain * uniform(len(grain), 0.0, 0.08).view(-1, 1, 1, 1)
    return images.clamp(0, 1)


def augment(
    images: torch.Tensor, may_flip: torch.Tensor, one_ink: torch.Tensor, glyph: torch.Tensor, size: int
) -> torch.Tensor:
    """Make a training batch from the stored squares.

    Args:
        images: RGBA, uint8, (batch, height, width, 4).
        may_flip: whether mirroring keeps the meaning: bool, (batch,).
        one_ink: whether it is drawn in one ink, whose colour may be replaced: bool, (batch,).
        glyph: whether it is a character, which is distorted and blurred more than a picture: bool, (batch,).
        size: side of the result in pixels.

    Returns:
        RGB in 0..1, float32, (batch, 3, size, size).
    """
    rgba = images.permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    wobble = torch.where(glyph, uniform(len(images), 0.0, 0.10), uniform(len(images), 0.0, 0.02))
    rgba = shaped(rgba, may_flip, wobble, size)
    ground = backgrounds(len(images), size)
    colours, alpha = rgba[:, :3], rgba[:, 3:].clamp(0, 1)
    colours = torch.where(one_ink.view(-1, 1, 1, 1), inked(alpha, ground), colours)
    pictures = coloured((colours + ground * (1 - alpha)).clamp(0, 1))
    return roughened(pictures, torch.where(glyph, 0.30, 0.15))
