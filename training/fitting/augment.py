"""Random changes to a batch of training pictures, drawn from one seeded generator.

All functions take uint8 (N, H, W, C) on any device. They draw random numbers on the CPU, so that a
seed gives the same numbers on every device.
"""

import torch
from torch import Generator, Tensor

from training.fitting.recipes import Recipe


def augment(pixels: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """``pixels`` with the augmentations of ``recipe``; same shape and dtype."""
    if recipe.flip:
        pixels = random_flip(pixels, generator)
    if recipe.crop_px:
        pixels = random_crop(pixels, recipe.crop_px, generator)
    if recipe.erase:
        pixels = random_erase(pixels, recipe.erase, generator)
    return pixels


def random_flip(pixels: Tensor, generator: Generator) -> Tensor:
    """Mirror each picture left to right with probability 1/2."""
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(2), pixels)


def random_crop(pixels: Tensor, pad_px: int, generator: Generator) -> Tensor:
    """Pad with zeros by ``pad_px`` on every side and cut a window of the original size."""
    count, height, width, _ = pixels.shape
    offsets = torch.randint(0, 2 * pad_px + 1, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height)).to(pixels.device)  # (N, H)
    columns = (offsets[1] + torch.arange(width)).to(pixels.device)  # (N, W)
    padded = torch.nn.functional.pad(pixels, (0, 0, pad_px, pad_px, pad_px, pad_px))
    pictures = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[pictures, rows[:, :, None], columns[:, None, :]]


def random_erase(pixels: Tensor, share: float, generator: Generator) -> Tensor:
    """Fill a random rectangle with noise in ``share`` of the pictures.

    The rectangle covers 2 to 25 % of the picture and has an aspect of 1:3 to 3:1 (Zhong et al.
    2017, https://arxiv.org/abs/1708.04896).
    """
    count, height, width, channels = pixels.shape
    area, aspect, top, left, chosen = torch.rand(5, count, 1, generator=generator)
    area = (0.02 + 0.23 * area) * height * width
    aspect = 3 ** (2 * aspect - 1)
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
    row, column = torch.arange(height), torch.arange(width)
    in_rows = (row >= top) & (row < top + tall) & (chosen < share)  # (N, H)
    in_columns = (column >= left) & (column < left + wide)  # (N, W)
    hole = (in_rows[:, :, None] & in_columns[:, None, :])[..., None].to(pixels.device)
    noise = torch.randint(0, 256, (count, height, width, channels), generator=generator)
    return torch.where(hole, noise.to(pixels.device, torch.uint8), pixels)
