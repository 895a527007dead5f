"""Sections `training:`, `teachers:`, `checkpoints:`, `logging:` and `run:` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mvd_scale.config.model import Positions
from mvd_scale.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]
ProductPrecision = Literal["auto", "bf16", "float32"]
FrozenPrecision = Precision | Literal["int8", "fp8"]
Checkpointing = Literal["none", "block", "attention"]


class TrainingConfig(Section):
    """Optimisation of a model under DeepSpeed."""

    epochs: int = Field(gt=0)
    """Number of epochs, passes over the data."""

    max_steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps after which the run stops; the schedules still span all epochs."""

    global_batch: int = Field(gt=0)
    """Number of clips per optimizer step over all ranks. The recipe fixes it; the batch per rank and the gradient
    accumulation follow from the number of ranks."""

    micro_batch: int | None = Field(default=None, gt=0)
    """Largest number of clips per rank in one forward pass; the rank's whole share of the global batch if omitted. The
    largest divisor of that share up to this number is used, with as many gradient accumulation steps as needed."""

    initial_encoder: Path | None = None
    """Initial weights of the encoder, in any format that `mvd-scale inspect` knows; random weights if omitted. An image
    model is inflated to clips; decoders start with random weights."""

    initial_positions: Positions | None = None
    """Position table with which `initial_encoder` was trained, for a file that does not tell: a fine-tuned classifier
    of MVD (`sincos3d`) or VideoMAE (`sinusoid`)."""

    base_lr: float = Field(gt=0)
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""

    min_lr: float = Field(default=1e-5, ge=0)
    """Final learning rate for a global batch of 256; scaled linearly with the batch."""

    warmup_epochs: float = Field(default=40, ge=0)
    """Number of epochs of linear warm-up from 0."""

    warmup_endpoint: bool = True
    """Whether the last step of the warm-up has the peak learning rate already (true for MVD and VideoMAE), or only the
    step after it (false for MAE)."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay; not applied to biases, norms and other one-dimensional parameters."""

    weight_decay_end: float | None = Field(default=None, ge=0)
    """Weight decay at the last step, reached along a cosine; constant if omitted."""

    clip_grad: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; no clipping if omitted."""

    precision: Precision = "fp32"
    """Precision of the student. fp16 uses dynamic loss scaling."""

    bf16_products: ProductPrecision = "auto"
    """Precision in which a CPU multiplies bf16 numbers of students and teachers, in linear layers and in attention;
    results are rounded to bf16 in any case. Some CPUs are faster in float32: those without instructions for bf16, and
    those with AMX that a virtual machine hides. `auto`: before the first step rank 0 times each product of the forward
    and the backward pass, and all ranks take the faster way. The times are kept in `bf16_trial.json` of the run, so
    that it resumes in the same way; on another kind of CPU they are measured anew. GPUs ignore this key."""

    initial_scale_power: int = Field(default=16, ge=0)
    """Loss scale of fp16 at the first step, as a power of two."""

    loss_scale_window: int = Field(default=2000, gt=0)
    """Number of optimizer steps without overflow after which the loss scale of fp16 doubles."""

    hysteresis: int = Field(default=1, gt=0)
    """Number of overflows, counted since the loss scale of fp16 last doubled, from which on each halves it. With 1
    every overflow halves it; with 2 the first one only skips its optimizer step, as all do."""

    deepspeed: str = "zero2"
    """DeepSpeed configuration: the name of a file in `ds_configs/`, or the path of another JSON file."""

    gradient_checkpointing: Checkpointing = "none"
    """Activations of each block that the backward pass recomputes instead of storing them. `none`: nothing is
    recomputed. `block`: the whole block is, which needs the least memory. `attention`: norm, projections and attention
    are, but not the MLP, which needs less computation."""

    compile: bool | Literal["auto"] = "auto"
    """Compile each block with torch.compile; blocks of the same shape share one program. `auto`: compile on GPUs with
    Triton and a C compiler, but not on CPUs, where it hardly saves time. At ZeRO stage 3, which gathers parameters
    inside of blocks, `auto` does not compile and `true` is an error."""

    collective_timeout_minutes: float = Field(default=10, gt=0)
    """Minutes that a rank waits for the other ranks in a collective; after that it fails, and the launcher ends the
    job."""

    hang_minutes: float | None = Field(default=5, gt=0)
    """Minutes without progress of any rank, or without a sign of life of one, after which the run ends with exit code
    75, names the rank, and writes the Python stacks of all ranks to `faults/`. The first step of a process may take 6
    times as long, because it may compile, and the writing of a checkpoint beside the steps 3 times as long without a
    tensor written. null never ends a run that hangs."""

    skip_nonfinite_steps: int = Field(default=3, ge=0)
    """Number of steps in a row that fp32 and bf16 runs skip because the gradients of a rank are not finite; the next
    one ends the run. `events.jsonl` names the clips of each. Skipped steps change no weight."""


class PretrainTraining(TrainingConfig):
    """Optimisation of a student in pre-training or distillation."""

    decay_tokens: bool = True
    """Whether weight decay applies to mask tokens and class tokens (true for MVD and MAE, false for VideoMAE)."""

    batch_decoders: bool | Literal["auto"] = "auto"
    """Run decoders of the same shape as one batched pass, each with its own weights. `auto`: do so on GPUs, but not on
    CPUs, where the tokens of several decoders exceed the cache and it costs time. At ZeRO stage 3, which gathers the
    weights of one layer at a time, `auto` is off and `true` is an error."""


class TeacherConfig(Section):
    """Placement and precision of frozen teachers."""

    sharding: Literal["zero3", "replicated", "auto"] = "auto"
    """`zero3`: each rank of the sharding group stores an equal part of a teacher. `replicated`: each rank stores the
    whole teacher. `auto`: shard teachers with more than `auto_shard_above` parameters."""

    auto_shard_above: int = Field(default=200_000_000, gt=0)
    """Number of parameters of a teacher above which `sharding: auto` shards it: for larger teachers, memory matters
    more than the time of the gathers."""

    shard_over: Literal["node", "world"] = "node"
    """Sharding group of a sharded teacher. `node`: the ranks of one host, so that gathers stay within the host, where
    they are fast. `world`: all ranks, which stores less per rank. It is always `world` if each host has one rank, and
    for momentum targets."""

    precision: FrozenPrecision | Literal["auto"] = "auto"
    """Precision of the weights and the arithmetic of teachers. `auto`: fp16 on GPUs, the precision of the student on
    CPUs. int8 (CPUs) and fp8 (GPUs of the generations Ada, Hopper and later, with torchao) apply to the linear layers
    of the blocks; such teachers are replicated, since ZeRO-3 shards floating-point parameters only."""

    compile: bool | Literal["auto"] = "auto"
    """Compile each block of the teachers with torch.compile, as `training.compile`; not supported for sharded teachers
    and for int8."""

    cuda_graphs: bool | Literal["auto"] = "auto"
    """Capture the forward pass of a replicated teacher on a GPU as a CUDA graph and replay it, which saves the launch
    time of its kernels. `auto`: capture wherever it is possible. `false` saves the memory that a graph reserves: the
    activations of one forward pass of each teacher."""

    prefetch: bool = True
    """On GPUs, compute teacher features of the next micro batch on a separate CUDA stream while the student trains on
    the current one. This takes the memory of one more batch, of its features, and of the activations of a teacher; the
    losses are the same. The features of momentum targets, whose weights change with every step, and all features on
    CPUs are computed in the step that uses them."""

    accept_inexact: bool = False
    """Accept int8 or fp8 even if the mean cosine similarity between features in 8 bits and in float32 is below 0.999.
    The similarity is measured on the first clip before training starts."""


class CheckpointConfig(Section):
    """Frequency and number of the checkpoints from which a run resumes."""

    every_epochs: float | None = Field(default=10, gt=0)
    """Number of epochs after which a checkpoint is saved; null for never."""

    every_steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps after which a checkpoint is saved; null for never."""

    every_minutes: float | None = Field(default=60, gt=0)
    """Number of minutes since the last checkpoint after which the next is saved; null for never."""

    keep: int = Field(default=3, gt=0)
    """Number of checkpoints to keep, the newest ones; older ones are deleted."""

    keep_every_steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps of whose multiples the checkpoints are never deleted; null to keep the newest alone."""


class PicturesConfig(Section):
    """Pictures of a few fixed clips during training: frames, mask, and each target beside its prediction."""

    every_epochs: float = Field(default=10, gt=0)
    """Number of epochs from one picture to the next."""

    clips: int = Field(default=4, gt=0)
    """Number of clips to show; the training never draws these clips."""


class ProbeConfig(Section):
    """Evaluation of the frozen encoder on labelled videos during training, by features of one clip of each video."""

    kind: Literal["knn", "linear"] = "knn"
    """`knn`: vote of the nearest neighbours by cosine similarity. `linear`: logistic regression."""

    train: str
    """Labelled videos to fit the classifier to, as `data.source`."""

    test: str
    """Labelled videos to test the classifier on, as `data.source`, with the same classes."""

    root: str | None = None
    """Folder or URL of relative paths in `train` and `test`, as `data.root`."""

    every_epochs: float = Field(default=10, gt=0)
    """Number of epochs from one evaluation to the next."""

    neighbours: int = Field(default=20, gt=0)
    """Number of nearest neighbours that vote, for `kind: knn`."""

    batch: int = Field(default=8, gt=0)
    """Number of videos per batch of a rank."""


class WandbConfig(Section):
    """Run of Weights & Biases, which needs the package `wandb`."""

    project: str = "mvd-scale"
    """Project of the run."""

    entity: str | None = None
    """User or team that owns the project; the default of the account if omitted."""

    name: str | None = None
    """Name of the run; the name of its folder if omitted."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """`online`: upload while the run goes on. `offline`: write into the run folder, for `wandb sync`. `disabled`: keep
    the section and write nothing."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""


class LoggingConfig(Section):
    """Metrics. They stay on the device and are read once every `every_steps` optimizer steps."""

    every_steps: int = Field(default=20, gt=0)
    """Number of optimizer steps from one reading of the metrics to the next."""

    tensorboard: bool = True
    """Write TensorBoard event files, in addition to `metrics.jsonl`."""

    wandb: WandbConfig | None = None
    """Write to Weights & Biases too; null for none. `{}` or any of its keys turns it on. A resumed run goes on there
    under the same id."""

    prometheus: Path | None = None
    """File ending in `.prom`, or folder for such files, of the textfile collector of Prometheus' node exporter on the
    host of rank 0, rewritten at each reading; null for none."""


class PretrainLogging(LoggingConfig):
    """Metrics of pre-training, and pictures and probes by which its progress is judged."""

    pictures: PicturesConfig | None = PicturesConfig()
    """Draw predictions of the student into `pictures/` and TensorBoard; null for none."""

    probe: ProbeConfig | None = None
    """Evaluate the frozen encoder on labelled videos, into `probe.jsonl` and TensorBoard; null for none."""


class RunConfig(Section):
    """Folder of a run."""

    folder: Path
    """Folder that receives the resolved recipe, metrics, checkpoints and the exported encoder."""
