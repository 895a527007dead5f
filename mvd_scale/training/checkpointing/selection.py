"""Choice of the checkpoints of a run: which are kept, and from which it resumes.

Several students of a run are saved at the same steps, and resume from the newest one that all of them have.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvd_scale.checkpoints.reading import TORN
from mvd_scale.config.training import CheckpointConfig
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing.files import find_damage
from mvd_scale.training.checkpointing.folders import (
    AHEAD,
    checkpoint_folder,
    common_steps,
    partial_folder,
    saved_steps,
)

logger = logging.getLogger("mvd_scale")


class Retention:
    """Rule by which old checkpoints are deleted: only steps that all students have count, and are deleted for all.

    Args:
        paths: folder of the checkpoints of each student of a run, or of its only model.
        config: checkpoints to keep.
    """

    def __init__(self, paths: Sequence[Path], config: CheckpointConfig) -> None:
        self.paths = paths
        self.config = config
        # The threads that write the checkpoints of several students call it.
        self._deleting = threading.Lock()

    def delete_old(self) -> None:
        """Delete the checkpoints that newer ones supersede.

        One that cannot be deleted is a warning: the next call tries it again.
        """
        every = self.config.keep_every_steps
        with self._deleting:
            kept = common_steps(self.paths)[-self.config.keep :]
            for path in self.paths:
                # Those that others lack as well: a run may have been killed between the deletions of two students.
                for step in saved_steps(path):
                    if kept and step < kept[0] and (not every or step % every):
                        _delete(checkpoint_folder(path, step))


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # On NFS, such as a file that another process still reads.
        logger.warning("old checkpoint %s cannot be deleted: %s; the next save tries it again", folder, error)


def choose_resumed_step(paths: Sequence[Path]) -> int | None:
    """Choose the newest step of which every folder has a whole checkpoint, and set aside those that are newer.

    Torn checkpoints get the suffix `.torn`, whole ones that other students lack `.ahead`, so that none is taken again.

    Args:
        paths: folder of the checkpoints of each student of a run, or of its only model.

    Returns:
        the step; None if the run begins anew, because no step was ever saved whole for all.

    Raises:
        UserError: there are checkpoints, but of no step for all; then none is renamed.
    """
    torn: dict[Path, str] = {}
    for step in reversed(common_steps(paths)):
        folders = [checkpoint_folder(path, step) for path in paths]
        damage = {folder: reason for folder in folders if (reason := find_damage(folder)) is not None}
        if not damage:
            _set_aside(paths, step, torn)
            return step
        torn |= damage
    if not torn and _only_the_first_is_unfinished(paths):
        _set_aside(paths, 0, torn)
        return None
    if torn:
        said = "; ".join(f"{_name(folder, paths)}: {reason}" for folder, reason in torn.items())
        raise UserError(
            f"no checkpoint in {_places(paths)} is whole ({said}): copy one of them there again, or start a new run in "
            "another `--run.folder`"
        )
    held = "; ".join(f"{path} has {', '.join(map(str, saved_steps(path))) or 'none'}" for path in paths)
    raise UserError(
        f"the students of this run have no checkpoint of the same step ({held}): copy the missing ones there again, or "
        "start a new run in another `--run.folder`"
    )


def _only_the_first_is_unfinished(paths: Sequence[Path]) -> bool:
    """Whether there are no checkpoints, or only the first one, which some students have not written to its end."""
    steps = {step for path in paths for step in saved_steps(path)}
    return len(steps) <= 1 and all(
        checkpoint_folder(path, step).is_dir() or partial_folder(path, step).is_dir()
        for path in paths
        for step in steps
    )


def _set_aside(paths: Sequence[Path], step: int, torn: Mapping[Path, str]) -> None:
    """Rename the checkpoints after a step."""
    for path in paths:
        for newer in (newer for newer in saved_steps(path) if newer > step):
            folder = checkpoint_folder(path, newer)
            aside = folder.with_name(folder.name + (TORN if folder in torn else AHEAD))
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            if folder in torn:
                logger.warning(
                    "checkpoint %s is torn: %s. It is now %s; the one before it is used", folder, torn[folder], aside
                )
            else:
                logger.warning(
                    "checkpoint %s is now %s: not all students of the run have a whole one of that step", folder, aside
                )


def _name(folder: Path, paths: Sequence[Path]) -> str:
    return folder.name if len(paths) == 1 else str(folder)


def _places(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
