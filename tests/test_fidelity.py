"""What equals the published code by value: the same inputs through it (tests/original.json) and through this project.

REPRODUCTION.md says what differs on purpose. tests/original.py draws the inputs, and made the outputs from the authors'
repositories.
"""

import json
import types
from argparse import Namespace

import numpy as np
import original
import pytest
import torch
from original import draw, few
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode

import main_linprobe
from abmilp import AbMILP
from aggregation.boxes import Annotation, ImageBoxes
from aggregation.localization import levels_of, summary, tally
from attention.metrics import METRICS, reduce_attention
from attention.reductions import REDUCTIONS
from data_sets.crop import RandomResizedCrop
from data_sets.loader import Sample
from encoders.families import FAMILIES
from engine_linprobe import FrozenTokens, Probing, evaluate
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import AGGREGATIONS, parse_head
from probing.pooling import Needs, Tokens
from runtime.folder import RunFolder
from runtime.training import Training
from util.lars import LARS
from util.lr_sched import lr_at
from util.pos_embed import sincos_pos_embed
from util.scores import Tally

ORIGINAL = json.loads(original.FILE.read_text())
GRID, NUM_PATCHES = (4, 4), 16  # of original.VIT
DIGITS = 1e-10  # the outputs are kept with 12


def close(ours, theirs, rtol=DIGITS, atol=DIGITS):
    np.testing.assert_allclose(np.asarray(ours, dtype=np.float64), theirs, rtol=rtol, atol=atol)


def filled(module: nn.Module, prefix: str = "", names=lambda key: key, scale: float = 0.2) -> nn.Module:
    """The module in float64, with the weights that original.py draws. names: of parameters here -> there."""
    shapes = original.shapes_of(module)
    state = original.weights({names(key): shape for key, shape in shapes.items()}, prefix, scale)
    module.double().load_state_dict({key: state[names(key)] for key in shapes})
    return module


def encoder(prefix: str = "") -> VisionTransformer:
    return filled(VisionTransformer(**original.VIT, pos_embed="learned"), prefix).eval().requires_grad_(False)


def images():
    return draw("images", 3, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# the recipe's parts: beyond_cls and MAE have the same
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", original.LARS_DECAYS)
def test_lars_is_the_published_one_for_every_kind_of_parameter(decay):
    parameters = {
        name: nn.Parameter(draw(f"start {name}", *shape) * (name != "zero"))
        for name, shape in original.LARS_SHAPES.items()
    }
    optimizer = LARS(parameters.values(), weight_decay=decay)
    for step, rate in enumerate(original.LARS_RATES):
        optimizer.param_groups[0]["lr"] = rate
        for name, parameter in parameters.items():
            zero = name == "matrix" and step == 3  # a norm of zero: nothing is scaled
            parameter.grad = draw(f"gradient {name} {step}", *parameter.shape) * (not zero)
        optimizer.step()
    for name, parameter in parameters.items():
        close(parameter.detach().flatten(), ORIGINAL["lars"][str(decay)][name])


@pytest.mark.parametrize(("setting", "rate"), list(zip(original.SCHEDULE, ORIGINAL["schedule"], strict=True)))
def test_schedule_is_the_published_one(setting, rate):
    close(lr_at(*setting), rate, atol=1e-14)


def test_crop_takes_the_published_windows_and_draws_as_many_numbers():
    found = []
    for size in original.CROP_SIZES:
        for seed in original.CROP_SEEDS:
            torch.manual_seed(seed)
            window = RandomResizedCrop.get_params(Image.new("RGB", size), (0.08, 1.0), (3 / 4, 4 / 3))
            found.append([*window, torch.randint(0, 10**6, (1,)).item()])
    assert found == ORIGINAL["crop"]["windows"]


def test_cropped_pixels_are_the_published_ones():
    torch.manual_seed(0)
    ours = RandomResizedCrop(4, interpolation=InterpolationMode.BICUBIC)(original.picture())
    close(ours, ORIGINAL["crop"]["pixels"], atol=1)  # a Pillow of another machine may round otherwise


@pytest.mark.parametrize("case", range(len(original.POSITIONS)))
def test_sine_cosine_table_is_the_published_one(case):
    width, side = original.POSITIONS[case]
    close(few(sincos_pos_embed(width, (side, side), num_prefix=1)[0], 96), ORIGINAL["positions"][case], atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# heads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", original.ABMILP)
def test_abmilp_is_the_published_one(name):
    x = draw("tokens", 2, 10, 16)
    head = AGGREGATIONS["abmilp"].build(Tokens(16, (3, 3), 1), **original.ABMILP[name])
    filled(
        head.pool, names=lambda k: k.replace("self_attention.", "self_attn.").replace("score.", "attention_predictor.")
    )
    vector, weights = head(Features(cls=x[:, 0], registers=x[:, 1:1], patches=x[:, 1:], cls_attention=None))
    close(vector.detach().flatten(), ORIGINAL["abmilp"][name]["vector"])
    close(weights.detach().flatten(), ORIGINAL["abmilp"][name]["weights"])


def test_gated_attention_is_that_of_ilse_et_al():
    names = {"score.0.V": "attention_V.0", "score.0.U": "attention_U.0", "score.1": "attention_w"}
    pool = AbMILP(500, depth=2, act="gated", hidden=128)
    filled(pool, names=lambda key: ".".join([names[key.rpartition(".")[0]], key.rpartition(".")[2]]), scale=0.05)
    check_bag(pool, ORIGINAL["gated attention"])


def test_residual_self_attention_is_that_of_rymarczyk_et_al():
    pool = AbMILP(512, depth=2, act="tanh", hidden=128, sa="residual").double()
    theirs = {"gamma": (1,)}
    for ours, name, width in (("query", "query_conv", 64), ("key", "key_conv", 64), ("value", "value_conv", 512)):
        theirs |= {f"{name}.weight": (width, 512, 1), f"{name}.bias": (width,)}
        state = original.weights(theirs, "self_att.", scale=0.05)
        getattr(pool.self_attention, ours).load_state_dict(
            {"weight": state[f"{name}.weight"].squeeze(2), "bias": state[f"{name}.bias"]}
        )
    pool.self_attention.gamma.data.copy_(original.weights(theirs, "self_att.", scale=0.05)["gamma"])
    filled(pool.score, "attention.", scale=0.05)
    check_bag(pool, ORIGINAL["residual self-attention"])


def check_bag(pool: AbMILP, theirs: dict) -> None:
    bag = draw("bag", 1, 9, 800)[..., : pool.width]
    vector, weights = pool(bag)
    close(few(vector), theirs["vector"])
    close(weights.detach().flatten(), theirs["weights"])


@pytest.mark.parametrize("head", original.FEATURES)
def test_heads_without_parameters_are_the_published_ones_at_their_scale(head):
    """The published code adds 1e-6 to the sum of the central patches' attention."""
    word = f"{head}:scale=release" if head == "dino" or head.startswith("ca") else head
    name, options = parse_head(word, {})
    pooling = AGGREGATIONS[name].build(Tokens(32, GRID, 1), **dict(options)).double()
    backbone, oracle = encoder(), encoder("oracle ")

    def attention_of_the_oracle(images):
        return oracle(images, cls_attention=True)[2].cls_attention.mean(1)

    needs = pooling.needs
    (features,) = backbone(images(), cls_attention=needs.cls_attention, patch_attention=needs.cells).values()
    features = features._replace(oracle=attention_of_the_oracle(images()) if needs.oracle else None)
    close(few(pooling(features).vector), ORIGINAL["features"][head], rtol=5e-6 if name == "ca" else DIGITS)


# ---------------------------------------------------------------------------------------------------------------------
# encoders and what is measured in them
# ---------------------------------------------------------------------------------------------------------------------


def tokens_of(features: Features) -> torch.Tensor:
    return torch.cat([features.cls[:, None], features.patches], dim=1)


def test_tokens_are_those_before_the_final_norm_of_the_published_encoder():
    features = encoder()(images(), blocks=[1, 2])
    close(few(tokens_of(features[2]), 96), ORIGINAL["features"]["raw"])
    close(few(tokens_of(features[1])), ORIGINAL["features"]["raw of block 1"])


def test_after_the_final_norm_the_cls_token_is_that_of_maes_linear_probe():
    frozen = FrozenTokens(encoder().float(), (2,), torch.float32, final_norm=True)
    close(few(frozen(images().float())[2].cls), ORIGINAL["mae"], rtol=1e-5, atol=1e-5)


def simmim() -> VisionTransformer:
    """Through the converter of SimMIM's files: a relative-position bias on every block's logits."""
    shapes = {key: tuple(shape) for key, shape in ORIGINAL["simmim"]["shapes"].items()}
    options = {**FAMILIES["simmim"].vit, **original.VIT}
    model = VisionTransformer(**options).double().eval().requires_grad_(False)
    model.load_state_dict(FAMILIES["simmim"].convert(original.weights(shapes)))
    return model


# in the order of the published code's statistics
STATISTICS = (
    "cls_self_attention", "patch_self_attention", "cls_self_attention_relative", "patch_self_attention_relative",
    "cls_patch_attention", "patch_cls_attention", "cls_patch_entropy", "patch_patch_entropy",
)  # fmt: skip


@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS if name != "triton"])
@pytest.mark.parametrize(("model", "name"), [(encoder, "statistics"), (simmim, "simmim")])
def test_attention_statistics_are_the_published_ones_but_for_their_epsilons(model, name, reduction):
    """Theirs divide by a sum of attention + 1e-6 and take ln(p + 1e-6), which lowers entropies by about M x 1e-6."""
    theirs = np.asarray(ORIGINAL[name]["attention"])  # (image, block, head, statistic)
    magnitudes = np.asarray(ORIGINAL[name]["magnitudes"])  # (image, block, [cls] or patches)
    for trace in model().trace(images()):
        reduced = reduce_attention(trace, 1, True, reduction)
        for index, metric in enumerate(STATISTICS):
            ours, published = METRICS[metric].compute(reduced).numpy(), theirs[:, trace.index, :, index]
            if metric.endswith("entropy"):
                assert (np.abs(ours - published) < 1.2e-6 * NUM_PATCHES).all(), metric
                assert (ours > published).all(), metric
            else:
                close(ours, published, rtol=2e-6 if metric.endswith("relative") else DIGITS)
        for index, metric in enumerate(("cls_update_ratio", "patch_update_ratio")):
            close(METRICS[metric].compute(reduced)[:, 0], magnitudes[:, trace.index, index], rtol=2e-6)
    close(few(trace.out[:, 0]), ORIGINAL[name]["cls"])


# ---------------------------------------------------------------------------------------------------------------------
# localisation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", original.THRESHOLD_STEPS)
def test_images_are_found_where_the_reference_finds_them_at_every_threshold_and_iou(step):
    """MaxBoxAccV2 and MaxBoxAcc (V1), with boxes that are brought to the size of the map."""
    images, levels = original.located(), levels_of(step)
    true = ImageBoxes(None, [Annotation(image.boxes, image.size) for image in images], None)
    truths = [true.resized(index, original.MAP_SIZE) for index in range(len(images))]
    total = tally([image.weights[None] for image in images], truths, (original.MAP_SIZE,) * 2, levels)
    of_threshold = np.searchsorted(levels, (np.arange(0, 1, step) * 255).astype(int))
    for version, (found,) in {"V1": total.found_v1, "V2": total.found}.items():
        theirs = ORIGINAL["localization"][f"{version} {step}"]
        if theirs["found"] is not None:
            assert found[of_threshold].T.tolist() == theirs["found"]
        close(100 * found.max(0) / len(images), theirs["best"])
    scores = summary(total, 0, levels)
    close(scores["maxboxaccv2"], np.mean(ORIGINAL["localization"][f"V2 {step}"]["best"]))
    close(scores["maxboxacc"], ORIGINAL["localization"][f"V1 {step}"]["best"][1])


# ---------------------------------------------------------------------------------------------------------------------
# the recipe
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", original.PROBES)
def test_a_probe_ends_with_the_weights_statistics_and_scores_of_the_published_engine(head):
    """Three epochs by LARS or SGD with warm-up and accumulation; then the evaluation."""
    theirs, (optimizer, lr) = ORIGINAL["probing"][head], original.PROBES[head]
    backbone = encoder()
    spec = ProbeSpec(head, 2, 0.1, 0, optimizer=optimizer)
    bank = ProbeBank([spec], backbone, GRID, original.CLASSES).double()
    (probe,) = bank.probes
    filled(probe.classifier, "head.")
    if head == "abmilp":
        filled(probe.aggregation.pool, names=lambda key: key.replace("score.", "attention_predictor."))
    start = probe.classifier.weight.detach().clone()

    class Float64Tokens(types.SimpleNamespace):
        def __call__(self, batch):
            return self.backbone(batch)

    tokens = Float64Tokens(backbone=backbone, needs=Needs())
    batches = [Sample(batch, labels, torch.arange(6), None) for batch, labels in original.micro_batches()]
    rule = main_linprobe.build_optimizer(
        Namespace(momentum=None, weight_decay=0.0), [spec], bank.parameter_groups([lr])
    )
    probing = Probing(bank, tokens, rule, torch.device("cpu"))
    args = Namespace(epochs=original.EPOCHS, seed=0, save_every_minutes=0, save_every_steps=0)
    order = Namespace(
        accum_iter=original.ACCUM, joined=1, steps=len(batches) // original.ACCUM,
        effective=original.ACCUM * original.BATCH,
    )  # fmt: skip

    def schedule(t, lr):
        return lr_at(t, lr, original.EPOCHS, original.WARMUP)

    training = Training(args, probing, probing.optimizer, schedule, batches, order, RunFolder(""))
    for _ in training.epochs():
        training.train_one_epoch()
        training.end_epoch()

    assert (probe.classifier.weight - start).norm() > 0.1 * start.norm()  # it went somewhere
    close(few(probe.classifier.weight), theirs["weight"], rtol=1e-8, atol=1e-8)
    close(probe.classifier.bias.detach(), theirs["bias"], rtol=1e-8, atol=1e-8)
    close(few(probe.norm.running_mean), theirs["running_mean"], rtol=1e-8, atol=1e-8)
    close(few(probe.norm.running_var), theirs["running_var"], rtol=1e-8, atol=1e-8)
    if head == "abmilp":
        close(few(probe.aggregation.pool.score[0].weight), theirs["query"], rtol=1e-8, atol=1e-8)
    held_out = [Sample(batch, labels, torch.arange(10), None) for batch, labels in original.held_out_batches()]
    tally = Tally(1, original.CLASSES, torch.device("cpu"))
    (scores,) = evaluate(bank, tokens, held_out, torch.device("cpu"), tally)
    close([scores.top1, scores.top5, scores.loss], [theirs["acc1"], theirs["acc5"], theirs["loss"]], rtol=1e-6)
