"""Contrastive pretraining is MoCo-v3's, and its sum with MAE's loss is a run like any other."""

import random
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY
from interruptions import Killed, differences, outcome
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from training_runs import COMMON, Program, log_lines, results

from data_sets.views import Stacked, contrastive_views
from encoders.load import load_encoder
from models_mae import random_masking, take
from models_moco import MomentumContrast, cls_tokens, momentum_at
from models_vit import VisionTransformer
from runtime.folder import load_checkpoint
from runtime.training import Training
from util.seeding import seeded


class Reference(nn.Module):
    """MoCo-v3 as its paper and code state it, around timm's ViT: everything twice, nothing shared with ours."""

    def __init__(self, hidden: int, temperature: float):
        super().__init__()
        sizes = {**TINY, "num_classes": 0, "class_token": True}
        self.temperature = temperature
        self.base, self.momentum = (timm.models.VisionTransformer(**sizes).double() for _ in range(2))
        self.head, self.momentum_head = (self.mlp([32, hidden, hidden, 256]) for _ in range(2))
        self.predictor = self.mlp([256, hidden, 256])

    @staticmethod
    def mlp(widths: list[int]) -> nn.Sequential:
        layers = []
        for number, (a, b) in enumerate(pairwise(widths), start=2):
            last = number == len(widths)
            layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)] + [nn.ReLU()] * (not last)
        return nn.Sequential(*layers).double()

    def loss(self, queries, keys):
        logits = torch.einsum("nc,mc->nm", F.normalize(queries, dim=1), F.normalize(keys, dim=1)) / self.temperature
        return nn.CrossEntropyLoss()(logits, torch.arange(len(logits))) * (2 * self.temperature)

    def forward(self, first, second, m):
        queries = [self.predictor(self.head(self.base(view))) for view in (first, second)]
        with torch.no_grad():
            trained = [*self.base.parameters(), *self.head.parameters()]
            for copy, own in zip([*self.momentum.parameters(), *self.momentum_head.parameters()], trained, strict=True):
                copy.data = copy.data * m + own.data * (1 - m)
            keys = [self.momentum_head(self.momentum(view)) for view in (first, second)]
        return self.loss(queries[0], keys[1]) + self.loss(queries[1], keys[0])


def test_loss_gradients_and_momentum_update_are_those_of_moco_v3():
    torch.manual_seed(0)
    ours = MomentumContrast(VisionTransformer(**TINY), hidden=48, temperature=0.3).double()
    theirs = Reference(48, 0.3)
    pairs = [(ours.encoder, theirs.base), (ours.momentum_encoder, theirs.momentum), (ours.projector, theirs.head),
             (ours.momentum_projector, theirs.momentum_head), (ours.predictor, theirs.predictor)]  # fmt: skip
    for own, other in pairs:
        missing, unexpected = other.load_state_dict(own.state_dict(), strict=False)
        assert not unexpected and all(".running_" in name or "num_batches" in name for name in missing)
    theirs.base.pos_embed.requires_grad_(False)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    optimizers = [torch.optim.SGD(parameters, lr=0.5) for parameters in trained]
    for step in range(3):
        views, m = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64), 1 - 0.5 * (1 + np.cos(np.pi * step / 3)) * 0.1
        assert momentum_at(step / 3, 0.9) == pytest.approx(m, abs=1e-15)
        ours.update(m)
        loss, other = ours(views, torch.rand(2, 6, 16)).loss, theirs(*views, m)
        torch.testing.assert_close(loss, other, rtol=0, atol=1e-12)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + other).backward()
        for own, other in pairs:
            named = dict(other.named_parameters())
            for name, parameter in own.named_parameters():
                torch.testing.assert_close(parameter, named[name], rtol=0, atol=1e-10)
                gradient = named[name].grad
                assert (parameter.grad is None) == (gradient is None), name
                if gradient is not None:
                    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()


def test_dropped_patches_are_those_of_the_highest_noise():
    torch.manual_seed(0)
    encoder, images, noise = VisionTransformer(**TINY), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    prefix, patches = encoder.embed(images)
    *_, last = encoder.trace_tokens(torch.cat([prefix, take(patches, random_masking(noise, 0.5)[0])], dim=1))
    torch.testing.assert_close(cls_tokens(encoder, images, noise, 0.5), encoder.norm(last.out)[:, 0])
    *_, last = encoder.trace(images)
    torch.testing.assert_close(cls_tokens(encoder, images, noise), encoder.norm(last.out)[:, 0])


@pytest.mark.parametrize(("view", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_views_are_those_of_moco_v3_to_the_pixel(view, blur, solarize):
    """At its input size, as published: a random crop without further interpolation options, BYOL's colours."""

    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    published = transforms.Compose([
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([blurred], p=blur),
        *([transforms.RandomApply([ImageOps.solarize], p=solarize)]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)).resize((300, 250))
    ours = contrastive_views(224, 0.2)[view]
    for number in range(8):
        with seeded(number):
            own = ours(image)
        with seeded(number):
            assert own.equal(published(image)), number
    assert Stacked(contrastive_views(224, 0.2))(image).shape == (2, 3, 224, 224)
    assert contrastive_views(64, loader="tensor")[view](image).isfinite().all()


SMALL = ["--projector_width", "32"]


@pytest.fixture
def program(image_folder):
    return Program("main_pretrain", [*COMMON, "--data_path", str(image_folder)])


@pytest.mark.parametrize(("weight", "epoch", "step"), [("0.5", 1, 1), ("1", 1, 1), ("1", 1, 0)])
def test_a_killed_run_is_resumed_to_the_bit(program, tmp_path, monkeypatch, weight, epoch, step):
    flags = ["--contrastive_weight", weight, *SMALL, "--view_drop", "0.5", "--save_every_steps", "4"]
    flags += ["--batch_size", "4", "--accum_iter", "2"]
    program.run(tmp_path / "whole", *flags)
    save = Training.save

    def killed(training):
        save(training)
        if (training.epoch, training.done) == (epoch, step):  # step 0: between two epochs
            raise Killed

    monkeypatch.setattr(Training, "save", killed)
    with pytest.raises(Killed):
        program.run(tmp_path / "run", *flags)
    monkeypatch.undo()
    program.run(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []
    line = log_lines(tmp_path / "run")[-1]
    parts = float(weight) * line["contrastive_loss"] + (1 - float(weight)) * line.get("reconstruction_loss", 0)
    assert line["loss"] == pytest.approx(parts) and results(tmp_path / "run")["last"]["cls_spread"] > 0.01


def test_the_weights_of_a_run_load_as_an_encoder_and_momentum_copies_are_kept(program, tmp_path):
    program.run(tmp_path, "--contrastive_weight", "0.5", *SMALL, "--epochs", "2", "--lr", "0")
    state = load_checkpoint(tmp_path / "checkpoint-1.pth")["model"]
    paths = [str(tmp_path / name) for name in ("encoder.safetensors", "checkpoint-1.pth")]
    files = [load_encoder(path, "vit_demo_patch8") for path in paths]
    for name, value in files[0].backbone.state_dict().items():
        assert value.equal(files[1].backbone.state_dict()[name]), name
        torch.testing.assert_close(state[f"momentum_encoder.{name}"], value, msg=name)  # nothing was trained
    assert files[1].record["family"] == "mae" and "decoder_pred.weight" in state and "predictor.0.weight" in state


TWO_PROCESSES = """
import copy, torch
from models_moco import MomentumContrast
from models_vit import VisionTransformer
from util.distributed import GradientMean, distributed, rank

def step(model, views, noise):
    parameters = [p for p in model.parameters() if p.requires_grad]
    mean, contrast = GradientMean(parameters, 1), model(views, noise)
    contrast.loss.backward()
    mean.add(contrast.loss[None])
    return [mean.take(), contrast.nearest, contrast.spread, *(p.grad for p in parameters)]

torch.manual_seed(0)
encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
model = MomentumContrast(encoder, 16, 0.2, drop=0.5).double()
views, noise = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64), torch.rand(2, 8, 16)
alone = step(copy.deepcopy(model), views, noise)
with distributed("cpu"):
    mine = slice(4 * rank(), 4 * rank() + 4)
    for one, two in zip(alone, step(model, views[:, mine], noise[:, mine]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
"""


def test_two_processes_take_the_step_that_one_takes(run_ranks, tmp_path):
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    result = run_ranks(tmp_path / "program.py")
    assert result.returncode == 0, result.stderr


def test_another_number_of_compared_images_is_another_run(program, tmp_path, capsys):
    flags = ["--contrastive_weight", "0.5", *SMALL, "--epochs", "1", "--warmup_epochs", "0", "--output_dir", tmp_path]
    program.run(tmp_path, *flags)
    message = program.mistake(capsys, *flags, "--batch_size", "4", "--accum_iter", "2", "--resume", "auto")
    assert "images compared was 8, is 4" in message


def test_a_collapse_is_reported_and_a_lower_rate_prevents_it(program, tmp_path, capsys):
    flags = ["--contrastive_weight", "1", *SMALL, "--epochs", "4", "--warmup_epochs", "0", "--batch_size", "24"]
    program.run(tmp_path / "high", *flags, "--lr", "0.5")
    assert "collapse: [cls] is nearly the same for all images (spread " in capsys.readouterr().out
    program.run(tmp_path / "low", *flags, "--lr", "1e-3")
    assert "collapse" not in capsys.readouterr().out
