"""Files are whole or absent."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interruptions import run

from cli.arguments import identity, plain
from util import files
from util.files import atomic_path, digest, sha256, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_bytes(b"half of the n")
        assert target.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_json_holds_standard_numbers_only(tmp_path):
    write_json(tmp_path / "good.json", {"x": [0.5, float("nan")], "y": -float("inf")})
    assert json.loads((tmp_path / "good.json").read_text()) == {"x": [0.5, None], "y": None}
    with pytest.raises(TypeError):
        write_json(tmp_path / "bad.json", {"x": object()})
    assert not (tmp_path / "bad.json").exists()


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_a_digest_tells_contents_apart_and_nothing_else():
    state = {"a": torch.arange(6.0), "b": [1, 2.5, None, "x", True], "c": {"d": torch.ones(2, dtype=torch.bfloat16)}}
    same = {"a": torch.arange(12.0)[::2].div(2), "b": (1, 2.5, None, "x", True), "c": dict(state["c"])}
    assert digest(state) == digest(same)
    others = [
        {**state, "a": torch.arange(6)}, {**state, "a": torch.arange(6.0)[None]}, {**state, "b": [1, 2.5, None, "x"]},
        {**state, "a": torch.arange(6.0).nextafter(torch.ones(()))}, {"b": state["b"], **state, "e": None},
        {"a": state["a"], "c": state["c"], "b": state["b"]}, {**state, "c": {"d": torch.tensor(1.0)}},
    ]  # fmt: skip
    assert len({digest(other) for other in [state, *others]}) == 1 + len(others)
    with pytest.raises(TypeError, match="no digest of a set"):
        digest({"a": {1}})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/x.pth?token=SECRET", "https://host/x.pth"),
        ("https://user:SECRET@host:8080/x.pth#SECRET", "https://host:8080/x.pth"),
        ("x.py --finetune 'https://host/x?token=SECRET&a=b' --seed 0", "x.py --finetune 'https://host/x' --seed 0"),
        ("runs/a?b#c@d", "runs/a?b#c@d"),
    ],
)
def test_credentials_of_urls_are_never_recorded(text, shown):
    assert files.without_credentials(text) == shown
    assert json.loads(files.to_json({"args": {"finetune": [text]}})) == {"args": {"finetune": [shown]}}
    args = argparse.Namespace(finetune=text, oracle=text, track=[], output_dir=Path("x"))
    assert "SECRET" not in str(plain(args)) + str(identity(args))


TRAIN = ["--epochs", "1", "--warmup_epochs", "0"]


@pytest.mark.parametrize(("program", "flags"), [
    ("main_linprobe", [*TRAIN, "--save_predictions"]), ("main_finetune", TRAIN), ("main_analyze_attention", []),
    ("main_analyze_aggregation", ["--loc_workers", "0"]),
])  # fmt: skip
def test_no_file_of_a_run_holds_the_secrets_of_a_url(
    program, flags, serve, image_folder, pretrained, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"{serve(pretrained.parent)}/{pretrained.name}?token=a.SECRET"
    argv = ["--finetune", url, "--data_path", str(image_folder), "--model", "vit_demo_patch8", "--input_size", "32",
            "--amp", "float32", "--device", "cpu", "--num_workers", "0", "--batch_size", "12", *flags]  # fmt: skip
    assert run(program, argv, tmp_path / "run") == 0
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 2 and not any(b"SECRET" in content for content in written)
    assert "SECRET" not in "".join(capfd.readouterr())


def test_a_locale_changes_neither_digests_of_names_nor_pages(tmp_path):
    name, page = b"caf\xc3\xa9", tmp_path / "page.md"
    in_ascii, in_utf8 = name.decode("ascii", "surrogateescape"), name.decode()
    page.write_text("é\n<!-- t: make page.md -->\n<!-- end of t -->\n", "utf-8")
    code = f"""if True:
        from util.files import Path, digest, keep_table
        keep_table(Path({str(page)!r}), "t", "make", "\\u00b1\\n", write=True)
        print(digest([{in_ascii!a}, "\\u03a3"]))"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == files.digest([in_utf8, "Σ"])
    assert files.digest(b"\xff".decode("utf-8", "surrogateescape"))
    assert page.read_text("utf-8") == "é\n<!-- t: make page.md -->\n±\n<!-- end of t -->\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(2**36), lambda: torch.empty(3, device="meta"), lambda: torch.ones(3).to_sparse(),
        lambda: functools.reduce(lambda inner, _: [inner, inner], range(60), [1]),
        lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []),
        lambda: (inner := []).append(inner) or inner,
    ],
)  # fmt: skip
def test_what_is_larger_than_its_file_has_no_digest(make):
    value = make()
    with pytest.raises(TypeError, match="no digest of"):
        digest({"state": value})
