"""The rates and the parameter groups of the recipes, by value. test_fidelity.py has the published schedule."""

import pytest
import timm.optim
import torch
from conftest import TINY

from engine_finetune import Classifier, layer_decay_groups
from models_mae import MaskedAutoencoder
from models_vit import VisionTransformer
from util.lr_sched import fitting_warmup, lr_at, scaled_lr


def test_without_warm_up_the_first_rate_is_the_peak():
    assert lr_at(0, lr=6.4, epochs=90, warmup_epochs=0) == 6.4


def test_a_warm_up_that_does_not_fit_is_shortened_and_logged(caplog):
    with caplog.at_level("INFO", "beyond_cls"):
        assert [fitting_warmup(10, epochs) for epochs in (90, 10, 9, 5)] == [10, 10, 0, 0]
        assert fitting_warmup(40, 30) == 3 and len(caplog.messages) == 3
    assert caplog.messages[-1] == "a warm-up of 40 epochs does not fit into 30: shortened to 3"


def test_rate_grows_with_the_batch():
    assert scaled_lr(0.1, 16384) == pytest.approx(6.4)
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def settings(groups, model):
    """{parameter name: (weight decay, factor of the rate)}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["weight_decay"], group.get("lr_scale", 1.0)) for group in groups for p in group["params"]}


def test_pretraining_decays_tokens_too():
    """As MAE, whose rule looks at the dimensions alone."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(VisionTransformer(**TINY), 24, 2, 2)
    ours = settings(timm.optim.param_groups_weight_decay(model, 0.05), model)
    assert set(ours) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours["encoder.cls_token"] == (0.05, 1.0) and ours["encoder.blocks.0.norm1.weight"] == (0.0, 1.0)


def test_fine_tuning_rates_fall_by_the_layer_and_tokens_biases_and_norms_are_not_decayed():
    model = Classifier(VisionTransformer(**TINY, reg_tokens=2).requires_grad_(True), 5)
    ours = settings(layer_decay_groups(model, weight_decay=0.05, layer_decay=0.5), model)
    assert set(ours) == {name for name, _ in model.named_parameters()}
    layers = {
        "backbone.cls_token": 0, "backbone.pos_embed": 0, "backbone.reg_token": 0, "backbone.patch_embed.": 0,
        "backbone.blocks.0.": 1, "backbone.blocks.1.": 2, "backbone.blocks.2.": 3, "backbone.norm.": 4, "head.": 4,
    }  # fmt: skip
    for name, (decay, scale) in ours.items():
        (layer,) = (layer for prefix, layer in layers.items() if name.startswith(prefix))
        assert scale == pytest.approx(0.5 ** (4 - layer)), name
        decayed = name.endswith("weight") and "norm" not in name
        assert decay == (0.05 if decayed else 0.0), name
