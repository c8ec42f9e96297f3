"""Maps of single images are rows of the attention matrix, drawn over what the encoder sees."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sets.images import read_image
from data_sets.views import eval_transform
from models_vit import build_vit
from util.plotting import visible

SCRIPT = str(Path(__file__).resolve().parent.parent / "scripts" / "show_attention.py")
PROGRAM = runpy.run_path(SCRIPT)
attention_of = PROGRAM["attention_of"]

pytestmark = pytest.mark.usefixtures("rendered")


@pytest.mark.parametrize(
    ("options", "query", "token"),
    [
        ({}, None, 0),
        ({}, (2, 1), 1 + 9),
        ({"reg_tokens": 3}, (3, 3), 4 + 15),
        ({"rel_pos_bias": True}, None, 0),
        ({"rel_pos_bias": True}, (0, 2), 1 + 2),
        ({"class_token": False, "reg_tokens": 4, "rope": True, "pos_embed": "none"}, (1, 0), 4 + 4),
    ],
    ids=["cls", "patch", "registers", "bias, cls", "bias, patch", "no cls"],
)
def test_map_is_the_row_of_the_full_attention(tiny, options, query, token):
    torch.manual_seed(0)
    model = build_vit(tiny, **options).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 3  # far from uniform
        if block.attn.rel_pos_bias is not None:
            block.attn.rel_pos_bias.relative_position_bias_table.data.normal_()
    image = torch.randn(3, 32, 32)
    step = list(model.trace(image[None]))[1]
    logits = step.q.double() @ step.k.double().mT * step.scale
    if step.logit_bias is not None:
        logits = logits + step.logit_bias.double()
    row = logits.softmax(-1)[0, :, token]
    patches = row[:, model.num_prefix_tokens :]
    for block in (1, -2):
        maps, to_self = attention_of(model, image, block, query, torch.float32)
        expected = (patches / patches.sum(1, keepdim=True)).unflatten(1, (4, 4))
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(to_self, row[:, token], rtol=1e-5, atol=1e-7)


def test_images_of_more_than_8_bits_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"^cannot read image \S+grey.png: its pixels have more than 8 bits"):
        read_image(tmp_path / "grey.png")


def test_heads_are_counted_from_0(monkeypatch):
    figures = []
    monkeypatch.setitem(
        PROGRAM["draw"].__wrapped__.__globals__, "save_figure", lambda figure, target: figures.append(figure)
    )
    maps = PROGRAM["Maps"]("MAE", np.zeros((8, 8, 3)), torch.full((3, 2, 2), 0.25), torch.zeros(3))
    PROGRAM["draw"]([maps], None, "heading", "unused")
    titles = [axis.get_title().splitlines()[0] for axis in figures[0].axes if axis.get_title()]
    assert titles == ["MAE", "mean over heads", "head 0", "head 1", "head 2"]


def test_picture_is_what_the_encoder_sees(image_folder):
    image = Image.open(next(image_folder.rglob("*.png"))).convert("RGB")
    transform = eval_transform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    plain = eval_transform(32, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(visible(transform(image), transform), plain(image).permute(1, 2, 0), atol=1e-6)


def test_one_picture_per_image_and_the_same_each_time(tiny, image_folder, tmp_path, run_script):
    images = sorted(image_folder.glob("val/red/*.png"))[:2]
    (tmp_path / "flat").mkdir()
    for path in images:
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    for folder, shown in (("a", images), ("b", [tmp_path / "flat"])):
        flags = ["--model", tiny, "--finetune", "", "", "--label", "one", "two", "--query", 1, 2]
        flags += ["--input_size", 32, "--output_dir", tmp_path / folder]
        assert run_script("show_attention.py", *shown, *flags)[0] == 0
    for image in images:
        assert (tmp_path / "a" / image.name).read_bytes() == (tmp_path / "b" / image.name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["broken.png"], "cannot read image broken.png"),
        (["missing.png"], "cannot read image missing.png"),
        (["a/x.png", "b/x.png"], "several images are called x"),
        (["a/x.png", "--no_cls_token"], "no [cls] token: --query ROW COLUMN shows"),
        (["a/x.png", "--query", "4", "0"], "has 4 x 4 patches, counted from 0"),
        (["a/x.png", "--block", "3"], "has blocks 0 to 2"),
        (["a/x.png", "--finetune", "nothing.pth"], "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(tiny, tmp_path, monkeypatch, run_script, words, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Image.new("RGB", (40, 40)).save(f"{folder}/x.png")
    Path("broken.png").write_bytes(b"no image")
    monkeypatch.setattr("util.progress.log.disabled", True)
    words = [*words, "--model", tiny, "--input_size", "32", "--output_dir", "out"]
    code, _, error = run_script("show_attention.py", *words)
    assert code == 2 and message in error and error.count("\n") == 1 and not Path("out").exists()
