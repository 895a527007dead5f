"""`training:`, `teachers:`, `checkpoints:` and `logging:` - how the student is optimised and watched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mvd_scale.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]
FrozenPrecision = Precision | Literal["int8", "fp8"]
Checkpointing = Literal["none", "block", "attention"]


class TrainingConfig(Section):
    """Optimisation of the student under DeepSpeed."""

    epochs: int = Field(gt=0)
    """Passes over the data."""

    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps; the schedule still spans all epochs."""

    global_batch: int = Field(gt=0)
    """Clips of one optimizer step over all ranks. Fixed by the recipe; the rest follows from the number of ranks."""

    micro_batch: int | None = Field(default=None, gt=0)
    """Most clips per rank in one forward pass; the whole share of the rank if left out. The largest number up to it
    that divides the share is taken, and accumulation follows."""

    initial_encoder: Path | None = None
    """Weights in any known format that the encoder starts from, in place of random ones. An image model is inflated to
    clips; decoders start at random."""

    base_lr: float = Field(gt=0)
    """Peak learning rate for a global batch of 256; scaled linearly."""

    min_lr: float = Field(default=1e-5, ge=0)
    """Last learning rate for a global batch of 256; scaled likewise."""

    warmup_epochs: float = Field(default=40, ge=0)
    """Epochs of linear warm-up from 0."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay; none for biases, norms, tokens and other one-dimensional parameters."""

    weight_decay_end: float | None = Field(default=None, ge=0)
    """Weight decay at the last step, reached by a cosine; constant if left out."""

    clip_grad: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; no clipping if left out."""

    precision: Precision = "fp32"
    """Of the student. fp16 uses dynamic loss scaling."""

    deepspeed: str = "zero2"
    """A file of `ds_configs/` by name, or the path of another DeepSpeed JSON."""

    gradient_checkpointing: Checkpointing = "none"
    """What of every block the backward pass computes again instead of keeping it: nothing; all (`block`, the least
    memory); norm, projections and attention but not the MLP (`attention`, less again to compute)."""

    compile: bool | Literal["auto"] = "auto"
    """Make each block a program of torch.compile, one for all blocks that are alike. `auto` does so on GPUs that have
    Triton and a C compiler. On CPUs it must be asked for, as it hardly gains there. At ZeRO stage 3, which gathers
    parameters inside of blocks, `auto` is off and `true` refused."""

    collective_timeout_minutes: float = Field(default=10, gt=0)
    """A rank that waits longer for the others gives up; then the launcher ends the job."""


class PretrainTraining(TrainingConfig):
    """Optimisation of a student that is distilled or pre-trained."""

    batch_decoders: bool | Literal["auto"] = "auto"
    """Run decoders of one shape as one batched pass, each with weights of its own. `auto` does so on GPUs; on CPUs,
    where a decoder's tokens are more than a cache holds, it costs time. At ZeRO stage 3, which gathers the weights of
    one layer at a time, `auto` is off and `true` refused."""


class TeacherConfig(Section):
    """How frozen teachers live on the ranks."""

    sharding: Literal["zero3", "replicated", "auto"] = "auto"
    """`zero3` keeps 1/world of a teacher per rank, `replicated` all of it; `auto` shards above `auto_shard_above`."""

    auto_shard_above: int = Field(default=200_000_000, gt=0)
    """Parameters of one teacher above which `auto` shards: beyond it memory matters more than the gathers."""

    shard_over: Literal["node", "world"] = "node"
    """Ranks that a sharded teacher is cut over: `node` keeps gathers within each host, where they are fast, `world`
    holds less per rank. Where each host has one rank, and for momentum targets, it is always the world."""

    precision: FrozenPrecision | Literal["auto"] = "auto"
    """Of the teachers' weights and arithmetic; `auto` is fp16 on GPUs and the student's precision on CPUs. In 8 bits
    (int8 on CPUs; fp8 on GPUs from Ada and Hopper on, with torchao) are the linear layers of the blocks; such teachers
    are replicated, as shards are made of floats."""

    compile: bool | Literal["auto"] = "auto"
    """As `training.compile`; neither for sharded teachers nor for int8."""

    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the forward pass of a replicated teacher on a GPU once and replay it, which spares the launches of its
    kernels; `auto` does so wherever it can. `false` gives back the memory that a recording keeps for itself: the
    activations of one forward pass of each teacher."""

    ahead: bool = True
    """On GPUs, compute the features of the next micro batch on a stream of their own while the student learns from this
    one. Takes the memory of one more batch, of its features and of a teacher at work; the losses are the same. Momentum
    targets, which move with every step, and CPUs compute them at their place."""

    accept_inexact: bool = False
    """Accept 8 bits although the features have a mean cosine under 0.999 with those in float32. That is tried on the
    first clip before the run begins."""


class CheckpointConfig(Section):
    """What a run leaves behind to go on from."""

    every_epochs: float | None = Field(default=10, gt=0)
    """Save after this many epochs."""

    every_steps: int | None = Field(default=None, gt=0)
    """Save after this many optimizer steps."""

    every_minutes: float | None = Field(default=60, gt=0)
    """Save when this much time has passed since the last save."""

    keep: int = Field(default=3, gt=0)
    """Newest checkpoints that are kept."""


class PicturesConfig(Section):
    """A few clips that are drawn again and again: frames, mask, and each target beside its prediction."""

    every_epochs: float = Field(default=10, gt=0)
    """Epochs between two pictures."""

    clips: int = Field(default=4, gt=0)
    """Clips to show, none of which the training sees."""


class ProbeConfig(Section):
    """Labelled videos on which the frozen encoder is judged during training: features of one clip of each."""

    kind: Literal["knn", "linear"] = "knn"
    """Vote of the nearest neighbours by cosine, or logistic regression."""

    train: str
    """Videos to learn from, as `data.source`, with labels."""

    test: str
    """Videos to be tested on, likewise, with the same classes."""

    root: str | None = None
    """As `data.root`, for both."""

    every_epochs: float = Field(default=10, gt=0)
    """Epochs between two probes."""

    neighbours: int = Field(default=20, gt=0)
    """That vote."""

    batch: int = Field(default=8, gt=0)
    """Videos that a rank encodes together."""


class LoggingConfig(Section):
    """Where numbers go. Metrics stay on the device and are read once per `every_steps`."""

    every_steps: int = Field(default=20, gt=0)
    """Optimizer steps between two readings of the metrics."""

    tensorboard: bool = True
    """Write TensorBoard event files beside `metrics.jsonl`."""


class PretrainLogging(LoggingConfig):
    """And what a person judges pre-training by."""

    pictures: PicturesConfig | None = PicturesConfig()
    """Draw what the student predicts, into `pictures/` and TensorBoard."""

    probe: ProbeConfig | None = None
    """Judge the encoder on labelled videos, into `probe.jsonl` and TensorBoard."""


class RunConfig(Section):
    """Where the run lives."""

    folder: Path
    """Folder of the run: resolved recipe, metrics, checkpoints, exported encoder."""
