"""The action detector: an encoder over whole clips, and a head on the boxes of people in them.

Legend: B clips, T frames, H W pixels, N tokens, D width, P people, C actions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mvd_scale.config import DetectorConfig, ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.initialization import init_finetune_weights

AVA_MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
AVA_STD = (0.225, 0.225, 0.225)
"""Normalisation of pixels in VideoMAE's code for AVA; it differs from that of the pre-training by up to 0.02 deviations
in the mean and 2 % in the scale."""


class Detector(nn.Module):
    """Detector that scores all actions for each box.

    The last feature map is averaged over time, RoIAlign samples it within the box, and the maximum over the samples
    goes to a linear head.

    As in the published code (VideoMAE's for AVA), the pre-trained final norm is applied before the average, pixels are
    normalised by `AVA_MEAN` and `AVA_STD`, and RoIAlign does not shift boxes by half a cell and widens those that are
    narrower than one cell to one (`aligned=False`).

    Raises:
        UserError: torchvision is not installed.
    """

    def __init__(self, model: ModelConfig, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(model, final_norm=True)
        self.encoder.mean, self.encoder.std = AVA_MEAN, AVA_STD
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.encoder.width, config.classes)
        self._align = _roi_align()
        init_finetune_weights(self.encoder.blocks, self.head, config.init_scale)

    def forward(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """Compute scores before the sigmoid (logits).

        Args:
            pixels: uint8 (B, T, H, W, 3); H and W are multiples of the patch size.
            boxes: float32 (P, 5): index of the clip, then x1, y1, x2, y2 in pixels of that clip.

        Returns:
            (P, C).
        """
        tokens = self.encoder(pixels)
        features = tokens.unflatten(1, self.encoder.grid_of(pixels)).mean(dim=1).permute(0, 3, 1, 2)
        # In float32: bf16 has 8 significant bits, too few for pixel coordinates above 256.
        cells = self._align(
            features.float(),
            boxes,
            output_size=self.config.resolution,
            spatial_scale=1 / self.encoder.config.patch_size,
            sampling_ratio=0,
            aligned=False,
        )
        scores: Tensor = self.head(self.dropout(cells.amax(dim=(2, 3)).to(tokens.dtype)))
        return scores


def _roi_align() -> Callable[..., Tensor]:
    try:
        from torchvision.ops import roi_align
    except ImportError as error:
        raise UserError("action detection needs torchvision: pip install 'mvd-scale[detection]'") from error
    aligned: Callable[..., Tensor] = roi_align
    return aligned
