"""Pre-training and distillation (stages 1 and 2): masked feature modelling of the recipe's targets (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvd_scale.checkpoints.native import describe_weights, save_weights, write_tensors
from mvd_scale.checkpoints.weights import load_initial_encoder
from mvd_scale.config import Recipe
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.clip_loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.targets.build import SharedTeachers, build_targets, merge_targets
from mvd_scale.targets.load import load_teacher, teacher_input_sizes, weight_digests
from mvd_scale.training.callbacks import Callback, PredictionImages, ProbeCallback, index_probe_videos
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.deepspeed_engine import full_parameters
from mvd_scale.training.distillation import StudentParts, distillation_models, random_student
from mvd_scale.training.run import TrainingJob, run_training
from mvd_scale.training.teachers.fidelity import check_fidelity
from mvd_scale.training.teachers.prefetch import BatchStarter, make_prefetcher
from mvd_scale.training.trained_model import TrainedModel


def run_pretraining(recipe: Recipe) -> None:
    """Run a recipe of pre-training or distillation; see `run_training`."""
    run_training(Pretraining(recipe, RunFolder(recipe.run.folder)))


class Pretraining(TrainingJob[Recipe]):
    """Training job of students that predict the targets of masked clips; of one student unless the recipe has more."""

    def __init__(self, recipe: Recipe, folder: RunFolder, name: str = "") -> None:
        super().__init__(recipe, folder, name)
        self.targets: dict[str, Target] = {}
        if recipe.students:
            self.students: Sequence[Pretraining] = [
                Pretraining(alone, folder.of_student(student), student)
                for student, alone in recipe.each_student().items()
            ]

    def prepare(self) -> None:
        """Prepare as every job does, and index the videos of the probe, if the recipe has one."""
        super().prepare()
        if self.recipe.logging.probe is not None:
            index_probe_videos(self.recipe.logging.probe, [run.folder for run in self.runs])

    def index(self) -> Manifest:
        """Index the training videos."""
        return load_source(self.recipe.data, self.folder.index)

    def open(self, ranks: Ranks) -> Manifest:
        """Read the manifest, which has one row per video."""
        self.manifest = Manifest.load(self.folder.manifest)
        return self.manifest

    def origins(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Compute digests of the videos and the teachers' weights."""
        recipes = [student.recipe for student in self.students]
        digests = run_on_rank0(ranks, "teachers", lambda: weight_digests(recipes))
        return [{"videos": self.manifest.digest, "teachers": teachers} for teachers in digests]

    def build(self, ranks: Ranks, steps_per_epoch: int) -> list[TrainedModel]:
        """Build the students and their targets, and check the fidelity of quantized teachers."""
        teachers = SharedTeachers(load_teacher)
        parts = [student.assemble(teachers, self.manifest, ranks) for student in self.students]
        self.targets = merge_targets(part.targets for part in parts)
        self.placements = [part.placement for part in parts]
        run_on_rank0(
            ranks,
            "fidelity",
            lambda: check_fidelity(self.targets, self.recipe, self.placements, self.manifest, ranks.device),
        )
        return distillation_models(parts, ranks, steps_per_epoch)

    def assemble(self, teachers: SharedTeachers, manifest: Manifest, ranks: Ranks) -> StudentParts:
        """Build this job's student and its targets on the CPU. All ranks call it.

        Args:
            teachers: teachers of all students.
            manifest: training videos.
            ranks: this process among all.
        """
        recipe, training, self.manifest = self.recipe, self.recipe.training, manifest
        self.targets = build_targets(recipe, lambda target: teachers(recipe, target))
        placement = make_placement(recipe, self.targets, ranks, self.name, bf16_record=self.folder.bf16_trial)
        student = random_student(recipe, self.targets)
        if training.initial_encoder is not None:
            load_initial_encoder(student.encoder, training.initial_encoder, training.initial_positions)
        return StudentParts(student, self.targets, recipe, placement, self.name)

    def export(self, engine: Any, folder: Path, ranks: Ranks) -> None:
        """Write the weights of the student, and of its encoder in a second file."""
        tensors = {name: full for name, full in full_parameters(engine) if ranks.is_main}
        if ranks.is_main:
            prefix = "encoder."
            encoder = {name.removeprefix(prefix): full for name, full in tensors.items() if name.startswith(prefix)}
            save_weights(folder / "encoder.safetensors", encoder, self.recipe.model)
            write_tensors(folder / "student.safetensors", tensors, self.describe())

    def describe(self) -> dict[str, str]:
        """Describe the student by the shapes of its encoder and its decoders."""
        targets = self.recipe.targets
        decoders = {name: target.decoder for name, target in targets.items() if target.decoder is not None}
        return describe_weights(self.recipe.model, decoders)

    def load(self, ranks: Ranks, steps: range) -> ClipLoader:
        """Create the loader of masked clips, resized to the input sides of student and teachers."""
        sides = teacher_input_sizes(self.recipe, self.targets)
        return ClipLoader.for_run(
            self.manifest, self.recipe, ranks.data_rank, steps, sides=sides, quarantine=self.folder.open_quarantine()
        )

    def prefetch(self, ranks: Ranks) -> BatchStarter | None:
        """Create the function that computes teacher features one batch in advance, or once for several students."""
        objective, tokens = MaskedDistillation(self.targets), self.recipe.shared_tokens
        return make_prefetcher(objective, self.placements, ranks.device, all_tokens=tokens)

    def callbacks(self, ranks: Ranks, steps_per_epoch: int) -> list[Callback]:
        """Create the callbacks of the recipe's `logging` section: pictures of predictions, and the probe."""
        recipe, folder, logging = self.recipe, self.folder, self.recipe.logging
        callbacks: list[Callback] = []
        if logging.pictures is not None:
            callbacks.append(PredictionImages(recipe, self.manifest, self.targets, folder, ranks, steps_per_epoch))
        if logging.probe is not None:
            callbacks.append(ProbeCallback(recipe, folder, ranks, steps_per_epoch))
        return callbacks
