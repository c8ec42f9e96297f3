"""TRACKERS of --track: where a run's metrics, configuration, figures and record go beside its folder.

TensorBoard writes files and raises their disk errors. A service that fails stops no run: it is logged once and not
called again. A resumed run continues the tracked run whose number is in its folder.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.files import to_json, write_json
from util.progress import log

if TYPE_CHECKING:
    import numpy as np

PROJECT = "beyond_cls"  # unless the service's own variable names another: WANDB_PROJECT, TRACKIO_PROJECT
RUN_FILE = "trackers.json"
RECORDS = ("args.json", "results.json", "attention.json", "aggregation.json", "log.txt")
PATIENCE = 30  # seconds for a service to begin and to end


class TensorBoard:
    def __init__(self, log_dir: Path, purge_step: int | None):
        """purge_step: the first step of this process; TensorBoard drops earlier values of that step and later ones."""
        from torch.utils.tensorboard import SummaryWriter

        date_back_event_files(log_dir)
        self.writer = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def finish(self, folder: Path, figures: Sequence[Path]) -> None:
        self.writer.close()


def date_back_event_files(log_dir: Path) -> None:
    """Rename TensorBoard's files so that they sort before one that is opened now.

    They are read in the order of their names, which begin with the second of their start: values of a run resumed
    within a second, or on a machine whose clock is behind, would come before those that they continue.
    """
    paths = sorted(log_dir.glob("events.out.tfevents.*"))
    for path, latest in zip(paths, range(int(time.time()) - len(paths), 2**40), strict=False):
        fields = path.name.split(".")
        if fields[3].isdecimal() and int(fields[3]) > latest:
            fields[3] = str(latest)
            path.rename(log_dir / ".".join(fields))


class Service:
    """A tracking service, each call of which may fail."""

    def __init__(self, name: str, folder: Path, record: Mapping[str, Any]):
        self.name, self.library, self.works = name, importlib.import_module(name), True
        self.run = self._try(SERVICES[name], self.library, folder, json.loads(to_json(record)))

    def _try(self, call: Callable, *values: Any, **options: Any) -> Any:
        try:
            return call(*values, **options) if self.works else None
        except Exception as error:  # of any library and network
            log.warning("--track %s failed and is left out from here on: %s", self.name, " ".join(str(error).split()))
            self.works = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self.run.log(dict(values), step=step))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._try(lambda: self.run.log({name: self.library.Image((255 * pixels).astype("uint8"))}, step=step))

    def flush(self) -> None:
        pass  # values are sent as they come

    def finish(self, folder: Path, figures: Sequence[Path]) -> None:
        """Send figures as images, and the records of the folder as an artifact."""
        images = {f"figures/{path.stem}": path for path in sorted(figures)}
        self._try(lambda: images and self.run.log({name: self.library.Image(str(p)) for name, p in images.items()}))
        self._try(self._send_records, folder)
        self._try(lambda: self.run.finish())

    def _send_records(self, folder: Path) -> None:
        artifact = self.library.Artifact(f"record-{run_id(folder)}", type="record")
        for path in (folder / name for name in RECORDS if (folder / name).exists()):
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)


def begin_wandb(wandb: Any, folder: Path, record: Mapping[str, Any]) -> Any:
    project, number = os.environ.get("WANDB_PROJECT", PROJECT), run_id(folder)
    names = {"project": project, "id": number, "name": f"{folder.name}-{number}", "dir": str(folder)}
    settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE)
    return wandb.init(**names, config=dict(record), resume="allow", reinit="create_new", settings=settings)


def begin_trackio(trackio: Any, folder: Path, record: Mapping[str, Any]) -> Any:
    project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{folder.name}-{run_id(folder)}"
    return trackio.init(project=project, name=name, config=dict(record), resume="allow", embed=False)


SERVICES = {"wandb": begin_wandb, "trackio": begin_trackio}
TRACKERS = ("tensorboard", *SERVICES)


def run_id(folder: Path) -> str:
    """The number of the tracked run, kept in the folder."""
    path = folder / RUN_FILE
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])
