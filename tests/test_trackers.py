"""Trackers: what reaches each service in its offline mode, resumption into one tracked run, services that fail."""

import argparse
import ast
import json
import re
import sqlite3
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli import arguments
from runtime import trackers
from runtime.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
RECORD = {"args": {"epochs": 2, "data_path": "images"}, "commit": "c0ffee"}
LOSSES = {step: 1 / (step + 1) for step in range(4)}


def track(folder, services, steps):
    """One process of a run: it starts, measures and ends."""
    run = RunFolder(folder, track=services)
    run.start(RECORD, purge_step=steps[0])
    for step in steps:
        run.scalars({"loss": LOSSES[step]}, step)
    run.image("reconstruction", np.full((4, 6, 3), 0.5), steps[-1])
    Image.new("RGB", (4, 4)).save(folder / "maps.png")
    run.write("results.json", {"top1": 50.0})
    run.close()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Folder of a run that was resumed once, tracked by both services offline."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
        patch.setenv("WANDB_MODE", "offline")
        for service in trackers.SERVICES:
            pytest.importorskip(service)
        track(folder / "run", ["wandb", "trackio"], [0, 1])
        track(folder / "run", ["wandb", "trackio"], [2, 3])
    return folder


def test_a_resumed_run_goes_on_in_the_same_trackio_run(tracked):
    database = sqlite3.connect(tracked / "trackio" / "beyond_cls.db")
    rows = database.execute("select run_id, step, metrics from metrics order by step").fetchall()
    assert {step: json.loads(metrics)["loss"] for _, step, metrics in rows if b'"loss"' in metrics} == LOSSES
    assert len({run for run, _, _ in rows}) == 1 and "reconstruction" in str(rows) and "figures/maps" in str(rows)
    assert "c0ffee" in str(database.execute("select * from configs").fetchall())
    files = database.execute("select manifest_digest from artifact_versions").fetchall()
    assert len(files) == 1  # the same record twice


def wandb_records(path):
    """The records of an offline run: a log in LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tracked):
    number = json.loads((tracked / "run" / "trackers.json").read_text())["id"]
    paths = sorted((tracked / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in paths] == [f"run-{number}.wandb"] * 2
    losses, text = {}, ""
    for record in (record for path in paths for record in wandb_records(path)):
        text += str(record)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses |= {json.loads(items["_step"]): json.loads(items["loss"])} if "loss" in items else {}
    assert losses == LOSSES
    for content in ("c0ffee", "reconstruction", "figures/maps", f"record-{number}", "results.json"):
        assert content in text, content


@pytest.mark.parametrize("fault", ["begin", "log", "finish"])
def test_a_failing_service_is_named_once_and_stops_nothing(tmp_path, monkeypatch, caplog, fault):
    class Run:
        def log(self, *_, **__):
            assert fault != "log", "no route to host"

        def log_artifact(self, _):
            pass

        def finish(self):
            raise TimeoutError("no route to host")

    class Library:
        Image = Artifact = staticmethod(lambda *_, **__: argparse.Namespace(add_file=lambda _: None))

    def begin(*_):
        if fault == "begin":
            raise ConnectionError("no route\nto host")
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", Library)
    monkeypatch.setitem(trackers.SERVICES, "wandb", begin)
    track(tmp_path / "run", ["tensorboard", "wandb"], [0, 1])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "--track wandb failed" in warning and "no route to host" in warning
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_service_that_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    args = argparse.Namespace(track=["tensorboard", "trackio"], dist_timeout=[300])
    with pytest.raises(ValueError, match=r"--track trackio.*requirements-track.txt"):
        arguments.check_files(args)


def test_no_tracker_is_imported_unless_asked():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        if path.parent.name != "tests":
            imported = [
                ast.unparse(line)
                for line in ast.parse(path.read_text()).body
                if isinstance(line, ast.Import | ast.ImportFrom)
            ]
            assert not re.search(
                r"import (wandb|trackio|tensorboard)|from (torch.utils.tensor|wandb|trackio)", str(imported)
            )
