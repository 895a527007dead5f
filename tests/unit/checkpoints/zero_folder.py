"""Run by every rank of test_deepspeed_folders.py: a DeepSpeed checkpoint of a tiny student, and its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
from mvd_scale.models import Student

SHAPE = ModelConfig(width=32, depth=1, heads=2, frames=4, input_size=32, positions="sinusoid")
DECODER = DecoderConfig(width=24, depth=1, heads=2)
CHANNELS = 17


def main(folder: Path, stage: int) -> None:
    # Without DeepSpeed's own reductions, which would be compiled first.
    init_distributed("cpu", timeout_minutes=3)
    torch.manual_seed(0)
    student = Student(SHAPE, {"video": (DECODER, CHANNELS)})
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    # ZeRO-3 keeps frozen parameters elsewhere.
    student.encoder.patch_embed.bias.requires_grad = False
    true = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=torch.optim.AdamW(trainable, lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            # Small buckets make several sub-groups of ZeRO-3.
            "zero_optimization": {"stage": stage, "sub_group_size": 3000},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.save_checkpoint(str(folder), tag="step_7")
    if torch.distributed.get_rank() == 0:
        save_file(true, folder / "true.safetensors")
    destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
