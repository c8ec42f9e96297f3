import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import models_vit
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from encoders.load import load_encoder
from scripts import inspect_checkpoint
from scripts import list as tables
from util.files import sha256

ROOT = Path(__file__).resolve().parent.parent
complete = pytest.mark.skipif(
    any(entry.publication not in PUBLICATIONS for entry in CATALOGUE.values()),
    reason="CATALOGUE is incomplete, and test_catalogue.py says what it lacks",
)

# ---- list.py


def list_table(name, words=(), write=None, check=None):
    tables.main(argparse.Namespace(table=name, words=words, write=write, check=check))


@pytest.mark.parametrize(
    ("name", "page"),
    [("metrics", "attention"), ("heads", "probing"), pytest.param("encoders", "encoders", marks=complete)],
)
def test_the_tables_in_the_pages_are_those_of_the_code(name, page):
    list_table(name, check=ROOT / "docs" / f"{page}.md")


@complete
def test_a_page_that_is_behind_is_refused_and_can_be_renewed(tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- encoders: python scripts/list.py encoders --write page.md -->\n", "<!-- end of encoders -->\n"
    page.write_text(f"before\n{begin}| old |\n{end}after\n")
    with pytest.raises(ValueError, match="the table of encoders is out of date"):
        list_table("encoders", check=page)
    list_table("encoders", write=page)
    list_table("encoders", check=page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| old |" not in text
    assert text.count("\n| `") == len(CATALOGUE)
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        list_table("encoders", check=page)


def test_words_choose_encoders(capsys):
    list_table("encoders", words=["ibot", "large"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0] for line in lines]
    assert names == ["| name", "|---|---|---|---|---|", "| `ibot_vit_large_patch16`", "| `ibot_vit_large_patch16_rand`"]
    assert "81.0 own features (authors)" in lines[2] and "2111.07832" in lines[2]
    with pytest.raises(ValueError, match="no name in the table of encoders contains resnet"):
        list_table("encoders", words=["resnet"])


# ---- inspect_checkpoint.py


@pytest.fixture
def state(tiny):
    torch.manual_seed(0)
    return models_vit.build_vit(tiny).state_dict()


def inspect(path, capsys, **options) -> tuple[int, str]:
    settings = {"file": str(path), "family": None, "model": None, "checkpoint_key": None, "offline": True}
    settings |= {"num_heads": None, "grid": None, **options}
    try:
        inspect_checkpoint.main(argparse.Namespace(**settings))
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out


def saved(path, state, **beside):
    torch.save({"model": state, **beside}, path)
    return path


def test_a_good_file_is_described_and_the_command_works(state, tiny, tmp_path, capsys):
    extra = {"decoder_embed.weight": torch.ones(2, 3), "mask_token": torch.ones(1)}
    args = argparse.Namespace(lr=0.1)
    path = saved(tmp_path / "w.pth", {**state, **extra}, epoch=799, args=args, scaler={"scale": np.float64(2)})
    code, text = inspect(path, capsys)
    assert code == 0
    assert sha256(path) in text
    assert re.search(r"family +mae, by its decoder: ", text) and re.search(rf"architecture +{tiny}\n", text)
    parameters = sum(value.numel() for value in state.values())
    assert f"parameters    {parameters:,} of the encoder, 2 heads" in text
    assert "32 x 32 pixels (4 x 4 patches)" in text
    assert re.search(r"used +blocks\.N\.attn\.qkv\.weight +96x32 +3\n", text)
    assert re.search(r"dropped: decoder_\*? +decoder_embed\.weight +2x3 +1\n", text)
    assert re.search(r"dropped: mask_token +mask_token +1 +1\n", text)
    assert "not used      epoch, args, scaler\n" in text
    words = text.split("use it with\n")[1].split()
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert load_encoder(options["--finetune"], options["--model"], options["--family"]).record["model"] == tiny


def test_every_problem_is_listed(state, tiny, tmp_path, capsys):
    state["blocks.1.ls1.gamma"] = torch.ones(32)
    state["norm.weight"][3] = state["norm.bias"][3] = torch.nan
    del state["blocks.2.attn.qkv.bias"]
    code, text = inspect(saved(tmp_path / "w.pth", state), capsys, family="mae")
    assert code == 1 and "use it with" not in text
    assert re.search(r"left over +blocks\.N\.ls1\.gamma +32 +1\n", text)
    assert re.search(r"missing +blocks\.N\.attn\.qkv\.bias +96 +1\n", text)
    for problem in ("missing blocks.2.attn.qkv.bias", "not used blocks.1.ls1.gamma", "norm.bias, norm.weight hold NaN"):
        assert problem in text.split("cannot be used:")[1]


def test_an_unknown_file_is_described_by_the_names_of_its_tensors(tmp_path, capsys):
    path = saved(tmp_path / "w.pth", {"layer.weight": torch.ones(2)}, cfg=argparse.Namespace())
    with pytest.raises(ValueError, match=r"holds no weights of a known family: its tensors are called layer.weight; "):
        inspect(path, capsys)


def test_families_that_a_plain_file_may_be_of_are_listed_with_a_command_each(state, tmp_path, capsys):
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "w.pth")
    code, text = inspect(tmp_path / "w.pth", capsys)
    assert code == 0 and "families timm, dino, the same encoder at the size of its positions" in text
    for family, rule in (("timm", "antialias"), ("dino", "offset")):
        assert re.search(rf"--finetune \S+w.pth --family {family} --data_path \S+  # .*; positions: {rule}\n", text)


def test_the_keys_of_encoders_in_a_file_are_named(state, tmp_path, capsys):
    torch.save({"model": state, "model_ema": {k: -v for k, v in state.items()}}, tmp_path / "w.pth")
    code, text = inspect(tmp_path / "w.pth", capsys)
    assert code == 0 and "also holds    an encoder: --checkpoint_key model_ema\n" in text


def test_what_a_checkpoint_key_leaves_is_counted(state, tmp_path, capsys):
    both = {f"{name}.{key}": value.clone() for name in "qk" for key, value in state.items()}
    torch.save(both, tmp_path / "w.pth")
    code, text = inspect(tmp_path / "w.pth", capsys, checkpoint_key="q")
    assert code == 0 and "also holds    an encoder: --checkpoint_key k" in text
    assert "--checkpoint_key q --family mae" in text


def test_a_size_without_a_name_is_read_from_the_file(state, tiny, tmp_path, capsys, monkeypatch):
    path = saved(tmp_path / "w.pth", state)
    monkeypatch.delitem(models_vit.ARCHITECTURES, tiny)
    code, text = inspect(path, capsys, family="mae")
    assert code == 1 and "state them with --num_heads (1, 2, 4, 8)" in text
    code, text = inspect(path, capsys, family="mae", num_heads=2)
    assert code == 0 and f"--model file --finetune {path} --num_heads 2 --family mae" in text
    monkeypatch.setitem(models_vit.ARCHITECTURES, tiny, models_vit.sizes(32, 4, 2, 8))
    assert "missing blocks.3.*" in inspect(path, capsys, family="mae", model=tiny)[1]


@pytest.mark.parametrize(
    "file, options, message",
    [
        ("nowhere.pth", {}, "no such file"),
        (ROOT / "README.md", {}, "cannot be read as a file of tensors"),
        ("simmim_vit_base_patch16", {}, "drive.google.com"),
        (ROOT / "README.md", {"model": "vit_enormous"}, "unknown model 'vit_enormous'"),
        (ROOT / "README.md", {"family": "mea"}, "unknown family 'mea': did you mean mae"),
    ],
)
def test_mistakes_in_the_arguments_are_one_line(file, options, message, capsys):
    with pytest.raises(ValueError, match=message):
        inspect(file, capsys, **options)


def test_the_script_answers_a_mistake_in_one_line(run_program):
    done = run_program("scripts/inspect_checkpoint.py", "simmim_vit_base_patch16")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
