"""Baseline clip loaders for comparison: three common combinations of libraries, written in the usual way.

Each yields what the published data set yields: 16 frames at stride 4, a multi-scale corner crop resized to 224, float32
normalised by ImageNet's mean and standard deviation, and a tube mask.

Legend: T frames, N tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

FRAMES, RATE, SIDE = 16, 4, 224
SCALES = (1.0, 0.875, 0.75, 0.66)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BASELINES = ("decord + PIL", "torchcodec + torchvision", "PyAV + torchvision")


def unavailable_reason(way: str, video: str) -> str | None:
    """Reason why a baseline cannot run here; None if it can read the first frame of a video."""
    try:
        _readers()[way](video, [0] * FRAMES)
    except (ImportError, OSError, RuntimeError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def baseline_loader(way: str, paths: Sequence[str], frames: Sequence[int], *, batch: int, workers: int) -> DataLoader:
    """Make an endless loader by one of `BASELINES`.

    Its batches are pixels, float32 (B, 3, T, 224, 224), and masks, bool (B, N).
    """
    return DataLoader(_Clips(paths, frames, _readers()[way]), batch_size=batch, num_workers=workers, shuffle=False)


def _readers() -> dict[str, Callable[[str, list[int]], Tensor]]:
    return dict(zip(BASELINES, (_decord_pil, _torchcodec, _pyav), strict=True))


class _Clips(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, paths: Sequence[str], frames: Sequence[int], read: Callable[[str, list[int]], Tensor]) -> None:
        self.paths = paths
        self.frames = frames
        self.read = read

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        video = item % len(self.paths)
        start = random.randint(0, max(self.frames[video] - FRAMES * RATE, 0))
        places = [min(start + RATE * k, self.frames[video] - 1) for k in range(FRAMES)]
        return self.read(self.paths[video], places), _tube_mask()


def _decord_pil(path: str, places: list[int]) -> Tensor:
    from PIL import Image

    pictures = [Image.fromarray(frame).convert("RGB") for frame in decord_frames(path, places)]
    top, left, height, width = _corner(pictures[0].height, pictures[0].width)
    box = (left, top, left + width, top + height)
    pictures = [picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures]
    stacked = np.concatenate([np.asarray(picture) for picture in pictures], axis=2)
    clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    clip = clip.view(FRAMES, 3, SIDE, SIDE)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        clip[:, channel].sub_(mean).div_(std)
    return clip.transpose(0, 1)


def _torchcodec(path: str, places: list[int]) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    return _torchvision(VideoDecoder(path, num_ffmpeg_threads=1).get_frames_at(places).data)


def _pyav(path: str, places: list[int]) -> Tensor:
    return _torchvision(torch.from_numpy(pyav_frames(path, places)).permute(0, 3, 1, 2))


def decord_frames(path: str, places: Sequence[int]) -> NDArray[np.uint8]:
    """Read frames of a file by decord, opening the file for this call: uint8 (T, H, W, 3)."""
    import decord

    reader = decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0))
    frames: NDArray[np.uint8] = reader.get_batch(list(places)).asnumpy()
    return frames


def pyav_frames(path: str, places: Sequence[int]) -> NDArray[np.uint8]:
    """Read frames by PyAV, decoding from the start of the file to the last frame: uint8 (T, H, W, 3).

    `places` must be ascending.
    """
    import av

    wanted, pictures = set(places), {}
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                pictures[number] = frame.to_ndarray(format="rgb24")
            if number == places[-1]:
                break
    return np.stack([pictures[place] for place in places])


def _torchvision(clip: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional

    top, left, height, width = _corner(*clip.shape[2:])
    small = functional.resized_crop(clip, top, left, height, width, [SIDE, SIDE], antialias=True)
    return functional.normalize(functional.to_dtype(small, scale=True), list(MEAN), list(STD)).transpose(0, 1)


def _corner(height: int, width: int) -> tuple[int, int, int, int]:
    short = min(height, width)
    sides = [int(short * scale) for scale in SCALES]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = random.choice(pairs)
    row, column = random.choice([(y, x) for y in range(5) for x in range(5) if (y - x) % 2 == 0])
    return row * ((height - h) // 4), column * ((width - w) // 4), h, w


def _tube_mask() -> Tensor:
    patches = (SIDE // 16) ** 2
    masked = int(0.9 * patches)
    spatial: NDArray[np.bool_] = np.hstack([np.zeros(patches - masked, bool), np.ones(masked, bool)])
    np.random.shuffle(spatial)
    return torch.from_numpy(np.tile(spatial, FRAMES // 2))
