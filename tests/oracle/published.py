"""One step of distillation with the arithmetic of the published code, in plain torch, written from the paper.

All tubes are embedded by a convolution of normalised float frames and then thrown away by boolean masks; attention is
an explicit softmax; teachers and decoders compute every token in every block. It borrows only the weights of our
modules, so that both give the same loss.

Legend: B clips, T frames, N tokens, D width, M masked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_scale.models import Decoder, Encoder, Student
from mvd_scale.models.blocks import QKV, Block


class Published(nn.Module):
    """Algorithm 1 for a student with decoders, an image teacher and a video teacher."""

    def __init__(self, student: Student, teachers: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.student = student
        self.teachers = nn.ModuleDict(teachers).eval().requires_grad_(False)

    def forward(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the smooth L1 losses; pixels uint8 (B, T, H, W, 3), hidden bool (B, N)."""
        video = _normalise(pixels, self.student.encoder)
        with torch.no_grad():
            features = {name: self._features(teacher, video) for name, teacher in self.teachers.items()}
        encoded = _encode(self.student.encoder, video, ~hidden)
        loss = torch.zeros(())
        for name, decoder in self.student.decoders.items():
            assert isinstance(decoder, Decoder)
            predicted = _decode(decoder, encoded, hidden)
            wanted = features[name][hidden].reshape(predicted.shape)
            loss = loss + F.smooth_l1_loss(predicted, wanted)
        return loss

    @staticmethod
    def _features(teacher: nn.Module, video: Tensor) -> Tensor:
        assert isinstance(teacher, Encoder)
        if teacher.config.frames > 1:
            return _encode(teacher, video)
        clips, _, _, height, width = video.shape
        fronts = video[:, :, ::2].transpose(1, 2).reshape(-1, 3, 1, height, width)
        features = _encode(teacher, fronts)[:, int(teacher.config.class_token) :]
        return features.reshape(clips, -1, features.shape[-1])


def _normalise(pixels: Tensor, encoder: Encoder) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (encoder.mean, encoder.std))
    return (pixels.permute(0, 4, 1, 2, 3).float() / 255 - mean) / std


def _encode(encoder: Encoder, video: Tensor, seen: Tensor | None = None) -> Tensor:
    config = encoder.config
    tube = (config.tubelet, config.patch_size, config.patch_size)
    kernel = encoder.patch_embed.weight.view(-1, *tube, 3).movedim(-1, 1)
    tokens = F.conv3d(video, kernel, encoder.patch_embed.bias, stride=tube).flatten(2).transpose(1, 2)
    tokens = tokens + encoder.positions
    if seen is not None:
        tokens = tokens[seen].reshape(len(tokens), -1, tokens.shape[-1])
    if encoder.class_token is not None:
        tokens = torch.cat([encoder.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
    for block in encoder.blocks:
        tokens = _block(block, tokens)
    return tokens if encoder.norm is None else encoder.norm(tokens)


def _decode(decoder: Decoder, encoded: Tensor, hidden: Tensor) -> Tensor:
    embedded = decoder.embed(encoded)
    clips, _, width = embedded.shape
    positions = decoder.positions.expand(clips, -1, -1)
    seen, unseen = (positions[mask].reshape(clips, -1, width) for mask in (~hidden, hidden))
    tokens = torch.cat([embedded + seen, decoder.mask_token + unseen], dim=1)
    for block in decoder.blocks:
        tokens = _block(block, tokens)
    predicted: Tensor = decoder.head(decoder.norm(tokens[:, -unseen.shape[1] :]))
    return predicted


def _block(block: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(block, Block)
    qkv, heads = block.attn.qkv, block.attn.heads
    assert isinstance(qkv, QKV)
    packed = F.linear(block.norm1(tokens), qkv.weight, qkv.bias())
    query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    shares = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    tokens = tokens + block.attn.proj((shares @ value).transpose(1, 2).flatten(2))
    norm = block.norm2
    return tokens + block.mlp(F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
