"""Weights are loaded completely or refused, in one line that lists all problems."""

import hashlib

import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY

import models_vit
from data_sets.views import IMAGENET_MEAN
from encoders import libraries
from encoders import load as checkpoints
from encoders.families import FAMILIES
from encoders.load import load_encoder, save_encoder
from engine_finetune import Classifier
from models_mae import MaskedAutoencoder
from models_vit import VisionTransformer


def refused(*arguments, **options):
    """The message of a refusal, which is one line."""
    with pytest.raises(ValueError) as error:
        load_encoder(*map(str, arguments), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def source(tiny):
    torch.manual_seed(0)
    return VisionTransformer(**TINY, pos_embed="learned").eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def mae_file(source, tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": source.state_dict()}, path)
    return path


PUBLISHED = {
    "mae": lambda vit: {"model": MaskedAutoencoder(vit, 24, 2, 2).published_state_dict(), "epoch": 3},
    "mae_ft": lambda vit: {"model": Classifier(vit, 5).published_state_dict(), "history": []},
    "dino": lambda vit: vit.state_dict(),
    "timm": lambda vit: {**vit.state_dict(), "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)},
}


# ---- what is accepted


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_file_gives_its_frozen_encoder(tiny, source, images, tmp_path, family):
    torch.save(PUBLISHED[family](source), tmp_path / "weights.pth")
    loaded = load_encoder(str(tmp_path / "weights.pth"), tiny, family)
    assert loaded.backbone(images)[2].patches.equal(source(images)[2].patches)
    assert not loaded.backbone.training and not any(p.requires_grad for p in loaded.backbone.parameters())
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    loaded.record.pop("assumed", None)
    assert loaded.record == {"model": tiny, "source": "weights.pth", "family": family, "sha256": digest}


@pytest.mark.parametrize("family", ["mae", "mae_ft"])
def test_our_own_checkpoints_need_no_family(tiny, source, tmp_path, family):
    torch.save(PUBLISHED[family](source), tmp_path / "weights.pth")
    assert load_encoder(str(tmp_path / "weights.pth"), tiny).record["family"] == family


def test_positions_of_another_input_size_keep_their_grid(tiny, tmp_path):
    wide = VisionTransformer(**{**TINY, "img_size": 64}, **FAMILIES["mae"].vit).eval()
    torch.save({"model": wide.state_dict()}, tmp_path / "wide.pth")
    loaded = load_encoder(str(tmp_path / "wide.pth"), tiny)
    for size in (32, 64):  # resampled once, from the file's own grid
        images = torch.randn(1, 3, size, size)
        assert loaded.backbone(images)[2].patches.equal(wide(images)[2].patches)


def test_a_timm_name_gives_timms_model_and_its_preprocessing(images, monkeypatch, tmp_path):
    create, asked, name = timm.create_model, [], "vit_base_patch16_224.augreg_in1k"
    small = {**TINY, "num_classes": 3}
    theirs = create(name, **small).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(libraries, "fetched", lambda *words: asked.append(words) or (tmp_path, "commit"))

    def create_small(name, pretrained_cfg_overlay, **options):
        return create(name, pretrained_cfg_overlay={**pretrained_cfg_overlay, "num_classes": 3}, **{**options, **small})

    monkeypatch.setattr(timm, "create_model", create_small)
    loaded = load_encoder(name, size=32)
    assert asked == [("timm/vit_base_patch16_224.augreg_in1k", False, "model.safetensors")]
    assert (loaded.mean, loaded.crop_pct, loaded.record["revision"]) == ((0.5, 0.5, 0.5), 0.9, "commit")
    theirs.reset_classifier(0)
    assert loaded.backbone.norm(loaded.backbone(images)[2].cls).equal(theirs.forward_features(images)[:, 0])


def test_without_weights_the_encoder_is_random_and_its_record_has_no_source(tiny):
    loaded = load_encoder("", tiny, class_token=False)
    assert loaded.record["source"] is None and not loaded.backbone.has_cls and loaded.mean == IMAGENET_MEAN


# ---- what is refused


def test_weights_of_an_unnamed_size_are_answered_with_the_model_that_reads_it(tiny, mae_file, monkeypatch):
    monkeypatch.delitem(models_vit.ARCHITECTURES, tiny)
    error = refused(mae_file, "vit_demo_patch8", family="mae")
    assert error.endswith("has width 32, 3 blocks and patches of 8 pixels: write --model file")
    assert "--num_heads (1, 2, 4, 8)" in refused(mae_file, "file", family="mae")
    assert load_encoder(str(mae_file), "file", family="mae", num_heads=2).record["model"] == "vit_width32_depth3_patch8"


def test_a_truncated_safetensors_file_is_refused(tiny, source, tmp_path):
    path = tmp_path / "cut.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path} cannot be read as safetensors" in refused(path, tiny)


def test_a_teacher_without_evidence_needs_a_key_or_a_family(tiny, source, tmp_path):
    teacher = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save({"student": teacher, "teacher": teacher}, tmp_path / "like.pth")
    keys = "--checkpoint_key student.backbone or --checkpoint_key teacher.backbone"
    assert refused(tmp_path / "like.pth", tiny).endswith(f"write {keys}")
    assert load_encoder(str(tmp_path / "like.pth"), tiny, family="dino_full").record["family"] == "dino_full"


SHAPES = [(), (3,), (0, 0), (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.one.x", "norm.weight"])
def test_tensors_of_strange_shapes_are_refused_in_one_line(tiny, source, tmp_path, name):
    """In every shape, and every kind of file in one of them; by detection and as a family."""
    for index, shape in enumerate(SHAPES):
        state = {**source.state_dict(), name: torch.zeros(shape)}
        nested = {"x": {f"y.{key}": value for key, value in state.items()}}
        kinds = [(state, None), ({"model": state}, None), ({"net": state}, None), (nested, None), (nested, "x.y")]
        torch.save(kinds[index][0], tmp_path / "w.pth")
        for family in (None, "mae", "dinov2"):
            refused(tmp_path / "w.pth", tiny, family=family, checkpoint_key=kinds[index][1])
    torch.save(nested, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tiny, checkpoint_key="x.y")


def test_family_auto_is_detection(tiny, mae_file):
    assert load_encoder(str(mae_file), tiny, family="auto").record == load_encoder(str(mae_file), tiny).record
    assert load_encoder("", tiny, family="auto").record["family"] is None
    assert checkpoints.known_family("mae_vit_base_patch16", "vit_base_patch16", "auto") == "mae"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"model": {}}, {}, "holds no weights of a known family: there are mae"),
        ({"student": {"norm.weight": torch.ones(1)}}, {"checkpoint_key": "teacher"}, "under --checkpoint_key teacher"),
        ({"student": {"x": torch.ones(1)}}, {"family": "mae"}, "no weights under 'model' (the file holds student)"),
        ({"model": {"decoder_x": torch.ones(1)}}, {"family": "mae"}, "no patch_embed.proj.weight"),
        ({}, {"family": "imaginary"}, "unknown family 'imaginary': choose one of auto, mae"),
        (torch.ones(3), {}, "holds a Tensor, not weights by name"),
    ],
)
def test_a_file_without_the_weights_is_refused(tiny, tmp_path, content, arguments, message):
    torch.save(content, tmp_path / "other.pth")
    assert message in refused(tmp_path / "other.pth", tiny, **arguments)


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        (
            "nowhere.pth",
            "--finetune nowhere.pth: no such file, and neither a timm model, a URL nor a name of the catalogue",
        ),
        (".", ". is a folder: name a file in it"),
        ("mae_vit_base_patch16", "--finetune mae_vit_base_patch16 is no vit_tiny_test: write --model vit_base_patch16"),
    ],
)
def test_a_name_without_weights_is_refused(tiny, finetune, message):
    assert message in refused(finetune, tiny)


# ---- saving


def test_equal_weights_are_saved_as_equal_files(source, tmp_path):
    metadata = {"family": "mae", "model": "é", "input_size": "32", "epochs": "3"}
    for index in range(5):
        save_encoder(tmp_path / f"{index}.safetensors", source.state_dict(), metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert checkpoints.safetensors_metadata(tmp_path / "0.safetensors") == metadata
    assert safetensors.torch.load_file(tmp_path / "0.safetensors")["norm.weight"].equal(source.norm.weight)


@pytest.mark.parametrize(("before", "after"), [(None, None), (b'"mae"', b'"mea"'), (b'"F32"', b'"I32"')])
def test_a_changed_byte_of_our_weights_is_named(before, after, tiny, source, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, source.state_dict(), {"family": "mae"})
    content = path.read_bytes()
    changed = content.replace(before, after, 1) if before else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    assert changed != content
    path.write_bytes(changed)
    assert f"{path} is damaged: its content is not what was saved" in refused(path, tiny)


def test_saved_weights_are_whole_or_absent(source, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "encoder.safetensors"
    save_encoder(path, source.state_dict(), {"family": "mae"})
    whole = path.read_bytes()
    assert checkpoints.safetensors_metadata(path) == {"family": "mae"}
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_encoder(path, source.state_dict(), {"family": "mae"})
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_stated_family_that_contradicts_the_metadata_is_used_with_a_warning(source, tmp_path, caplog):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, source.state_dict(), {"family": "mae"})
    with caplog.at_level("WARNING"):
        assert load_encoder(str(path), "vit_tiny_test", family="dino").record["family"] == "dino"
    assert "states family mae; it is read as dino" in caplog.text
