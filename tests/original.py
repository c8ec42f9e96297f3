"""What the published code computes: inputs that anybody can draw, and the outputs in tests/original.json.

The outputs were written by this program, from the authors' own code in folders beside it:

    pip install --no-deps --target site timm==0.9.16 einops munch    # timm as beyond_cls pins it
    python tests/original.py --site site --beyond_cls beyond_cls --mae mae --ilse AttentionDeepMIL \\
        --sa Kernel_SA-AbMILP --wsol wsolevaluation

with gmum/beyond_cls at 22ed799, facebookresearch/mae at efb2a80, AMLab-Amsterdam/AttentionDeepMIL at eb0434b,
gmum/Kernel_SA-AbMILP at bad56bc and clovaai/wsolevaluation at 96f4b88. It imports them and calls them; nothing of them
is kept here but numbers. Everything runs in float64. test_fidelity.py gives the same inputs to this project's code.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import sys
import tempfile
import types
import typing
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".json")

# ---------------------------------------------------------------------------------------------------------------------
# inputs
# ---------------------------------------------------------------------------------------------------------------------

LARS_SHAPES = {"matrix": (5, 7), "row": (1, 6), "kernel": (2, 3, 4), "vector": (6,), "scalar": (), "zero": (3, 3)}
LARS_RATES = (0.0, 0.5, 6.4, 3.2, 3.2, 1.0)  # of six steps
LARS_DECAYS = (0.0, 0.1)

# epoch, lr, epochs, warmup_epochs, min_lr
SCHEDULE = [(t, 6.4, 90, 10, 0.0) for t in (0, 1 / 78, 2.5, 9.99, 10, 10 + 1 / 78, 30, 50, 89 + 77 / 78)]
SCHEDULE += [(t, 2.4e-3, 800, 40, 1e-5) for t in (0.25, 40, 420.5, 799.9)] + [(3, 0.4, 50, 0, 0.0)]

CROP_SIZES = [(500, 300), (300, 500), (224, 224), (400, 20), (20, 400), (9, 7)]  # width, height
CROP_SEEDS = range(6)

POSITIONS = [(16, 3), (768, 14), (1280, 16)]  # width, side of the grid

ABMILP = {
    "depth 1": {"depth": 1},
    "depth 2, relu": {"depth": 2},
    "depth 4, relu": {"depth": 4},
    "depth 2, tanh": {"depth": 2, "act": "tanh"},
    "depth 3, tanh": {"depth": 3, "act": "tanh"},
    "self-attention for scores": {"sa": "map"},
    "self-attention for both": {"sa": "both"},
    "positions": {"cond": "pe"},
    "all tokens": {"content": "all"},
    "all of it": {"depth": 2, "act": "tanh", "sa": "both", "cond": "pe", "content": "all"},
}

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}  # 16 patches
FEATURES = ("cls", "pos", "cp1", "cp2", "cp3", "ca1", "ca2", "ca4", "attn-mn", "attn-lcte", "dino")

# what is trained, by which optimizer and at which rate; three epochs, the first one warm-up, of 8 steps of 2 x 6 images
PROBES = {"cls": ("lars", 6.4), "pos": ("sgd", 0.5), "abmilp": ("lars", 6.4)}
EPOCHS, WARMUP, MICRO_STEPS, ACCUM, BATCH, CLASSES = 3, 1, 16, 2, 6, 7

THRESHOLD_STEPS = (0.1, 0.01, 0.001)  # the last two: of the reference's command line, and of its training code
MAP_SIZE = 224


def draw(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers (float64) that the name decides. NumPy promises never to change this generator's stream."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(scale * generator.standard_normal(shape)))


def weights(shapes: dict[str, tuple[int, ...]], prefix: str = "", scale: float = 0.2) -> dict[str, Tensor]:
    """A state dict for parameters of these names and shapes; norms and layer scales have weights about 1."""
    around_one = ("norm1.weight", "norm2.weight", "norm.weight", "gamma_1", "gamma_2")
    return {key: draw(prefix + key, *shape, scale=scale) + float(key.endswith(around_one))
            for key, shape in shapes.items()}  # fmt: skip


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items() if value.is_floating_point()}


def picture(width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def micro_batches(count: int = MICRO_STEPS) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the probes' training."""
    labels = np.random.RandomState(1).randint(0, CLASSES, (count, BATCH))
    return [(draw(f"train {i}", BATCH, 3, 32, 32), torch.from_numpy(labels[i]).long()) for i in range(count)]


def held_out_batches() -> list[tuple[Tensor, Tensor]]:
    labels = np.random.RandomState(2).randint(0, CLASSES, (2, 10))
    return [(draw(f"test {i}", 10, 3, 32, 32), torch.from_numpy(labels[i]).long()) for i in range(2)]


class Located(typing.NamedTuple):
    """An image of which maps are to find the objects."""

    weights: np.ndarray  # of its patches
    size: tuple[int, int]  # width, height
    boxes: np.ndarray  # (m,4) x0, y0, x1, y1


def located(count: int = 48) -> list[Located]:
    """Maps that more or less follow the first of one to four boxes; rings, single patches, constant ones, NaN. Some
    boxes touch the image's border, or end at its width and height, as those do that count pixels from 1."""
    random, found = np.random.RandomState(3), []
    for index in range(count):
        size = random.randint(40, 600, 2)
        boxes = np.sort(random.randint(0, size, (1 + index % 4, 2, 2)), axis=1)
        boxes[0, 1] = np.minimum(boxes[0, 1] + size // 5, size - 1)
        if index % 5 == 0:
            boxes[-1, index % 2] = (0, 0) if index % 2 == 0 else size
        rows, columns = (14, 14) if index % 7 else (6, 9)
        centre, half = boxes[0].mean(0) / size, (boxes[0, 1] - boxes[0, 0] + 1) / size * random.uniform(0.3, 1.2, 2)
        x = ((np.arange(columns) + 0.5) / columns - centre[0]) / half[0]
        y = ((np.arange(rows) + 0.5) / rows - centre[1]) / half[1]
        distance = x**2 + y[:, None] ** 2
        weights = 1 / (1 + distance**2) + 0.05 * (index % 4) * random.rand(rows, columns)
        kind = {11: "constant", 17: "nan", 23: "patch", 29: "constant"}.get(index) or ("ring" if index % 6 == 4 else "")
        if kind == "ring":
            weights = ((distance > 0.3) & (distance < 1.2)) + 0.2 * random.rand(rows, columns)
        elif kind == "constant":  # no contour: the reference predicts the first pixel
            weights = np.full((rows, columns), 0.25)
            boxes[0] = 0
        elif kind in ("patch", "nan"):
            weights = np.where(np.arange(rows * columns) == 31, np.nan if kind == "nan" else 1.0, 0.0)
        found.append(Located(weights.reshape(rows, columns), tuple(size.tolist()), boxes.reshape(-1, 4)))
    return found


def few(values: Tensor, count: int = 48) -> list[float]:
    """Up to so many of a tensor's numbers, always from the same places."""
    flat = values.detach().flatten()
    chosen = np.sort(np.random.RandomState(0).permutation(len(flat))[:count])
    return flat[torch.from_numpy(chosen)].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# outputs of the published code
# ---------------------------------------------------------------------------------------------------------------------


def by_path(path: Path) -> types.ModuleType:
    """A module of another repository's `util` than the one on the path."""
    spec = importlib.util.spec_from_file_location(path.stem + "_elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(module: nn.Module, prefix: str = "", scale: float = 0.2, leave: tuple[str, ...] = ()) -> nn.Module:
    shapes = {key: shape for key, shape in shapes_of(module).items() if key not in leave}
    module.double().load_state_dict(weights(shapes, prefix, scale), strict=False)
    return module


def shortened(values):
    """With 12 digits of every number."""
    if isinstance(values, dict):
        return {key: shortened(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [shortened(value) for value in values]
    return float(f"{values:.12g}") if isinstance(values, float) else values


def lars(module: types.ModuleType) -> dict:
    found = {}
    for decay in LARS_DECAYS:
        parameters = {
            name: nn.Parameter(draw(f"start {name}", *shape) * (name != "zero")) for name, shape in LARS_SHAPES.items()
        }
        optimizer = module.LARS(parameters.values(), lr=0.1, weight_decay=decay)
        for step, rate in enumerate(LARS_RATES):
            optimizer.param_groups[0]["lr"] = rate
            for name, parameter in parameters.items():
                zero = name == "matrix" and step == 3
                parameter.grad = draw(f"gradient {name} {step}", *LARS_SHAPES[name]) * (not zero)
            optimizer.step()
        found[str(decay)] = {name: parameter.flatten().tolist() for name, parameter in parameters.items()}
    return found


def schedule(module: types.ModuleType) -> list[float]:
    names = ("lr", "epochs", "warmup_epochs", "min_lr")
    optimizer = types.SimpleNamespace(param_groups=[{}])
    return [
        module.adjust_learning_rate(optimizer, t, types.SimpleNamespace(**dict(zip(names, settings, strict=True))))
        for t, *settings in SCHEDULE
    ]


def crop(module: types.ModuleType) -> dict:
    """Windows (top, left, height, width), each with a number drawn after it; and cropped pixels."""
    windows = []
    for size in CROP_SIZES:
        for seed in CROP_SEEDS:
            torch.manual_seed(seed)
            window = module.RandomResizedCrop.get_params(Image.new("RGB", size), (0.08, 1.0), (3 / 4, 4 / 3))
            windows.append([*window, torch.randint(0, 10**6, (1,)).item()])
    torch.manual_seed(0)
    return {"windows": windows, "pixels": np.asarray(module.RandomResizedCrop(4, interpolation=3)(picture())).tolist()}


def positions(module: types.ModuleType) -> list[list[float]]:
    return [
        few(torch.from_numpy(module.get_2d_sincos_pos_embed(width, side, cls_token=True)), 96)
        for width, side in POSITIONS
    ]


def abmilp(module: types.ModuleType) -> dict:
    found = {}
    for name, options in ABMILP.items():
        head = module.ABMILPHead(
            16, self_attention_apply_to=options.get("sa", "none"), activation=options.get("act", "relu"),
            depth=options.get("depth", 1), cond=options.get("cond", "none"),
            content=options.get("content", "patch"), num_patches=9,
        )  # fmt: skip
        vector, attention = fill(head, leave=("pos_embed",)).forward_with_attn_map(draw("tokens", 2, 10, 16))
        found[name] = {"vector": vector.flatten().tolist(), "weights": attention.flatten().tolist()}
    return found


def bag_attention(model: nn.Module, width: int) -> dict:
    """Weights and bag vector of a model of Ilse et al. or after them, with the instances in place of its features."""
    model.feature_extractor_part1 = nn.Identity()
    model.feature_extractor_part2 = nn.Identity()
    model.feature_extractor_part2.forward = lambda h: h[:, :width]
    fill(model, scale=0.05)
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, _, attention = model(draw("bag", 1, 9, 800))
    return {"vector": few(seen[0]), "weights": attention.flatten().tolist()}


def statistics(module: types.ModuleType, model: nn.Module) -> dict:
    """What collect_features of the attention analysis returns: one number per image, block, head; per image, block."""
    module.args = types.SimpleNamespace(amp="none")
    images = draw("images", 3, 3, 32, 32)
    labels = torch.zeros(3)
    vectors, _, attention, magnitudes = module.collect_features(
        model, [(images[:2], labels[:2]), (images[2:], labels[2:])], "cpu"
    )
    return {"cls": few(vectors), "attention": attention.tolist(), "magnitudes": magnitudes.tolist()}


def vit(module: types.ModuleType, prefix: str = "", **options) -> nn.Module:
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    model = module.VisionTransformer(mlp_ratio=4, qkv_bias=True, norm_layer=norm, **VIT, **options)
    return fill(model, prefix).eval()


@torch.no_grad()
def features(models_vit: types.ModuleType) -> dict:
    model = vit(models_vit, oracle=False, num_classes=CLASSES)
    model.oracle = vit(models_vit, "oracle ", oracle=False, num_classes=CLASSES)
    images = draw("images", 3, 3, 32, 32)
    found = {name: few(model.forward_features(images, return_features=name)[0]) for name in FEATURES}
    found["raw"] = few(model.forward_features(images, return_features="raw")[0], 96)
    found["raw of block 1"] = few(model.forward_features(images, return_features="raw", return_block=1)[0])
    return found


def probing(models_vit: types.ModuleType, heads: types.ModuleType, engine, misc, optimizers: dict) -> dict:
    """Training and evaluation of a probe of each kind by the published engine."""
    engine.MaskedAutoencoderViT = type(None)  # the name that its evaluation lacks
    found = {}
    for head, (kind, lr) in PROBES.items():
        model = vit(models_vit, oracle=False, num_classes=CLASSES)
        norm = nn.BatchNorm1d(VIT["embed_dim"], affine=False, eps=1e-6)
        first = [heads.ABMILPHead(VIT["embed_dim"], "none", "relu", 1, "none", "patch", 16)] if head == "abmilp" else []
        model.head = nn.Sequential(*(fill(one, leave=("pos_embed",)) for one in first), norm, model.head).double()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in model.head.parameters():
            parameter.requires_grad_(True)
        optimizer = optimizers[kind](model.head.parameters(), lr=lr, weight_decay=0)
        args = types.SimpleNamespace(
            accum_iter=ACCUM, amp="none", warmup_epochs=WARMUP, epochs=EPOCHS, lr=lr, min_lr=0.0, cls_features=head,
            return_block=None,
        )  # fmt: skip
        scaler = misc.NativeScalerWithGradNormCount()
        for epoch in range(EPOCHS):
            engine.train_one_epoch(
                model, nn.CrossEntropyLoss(), micro_batches(), optimizer, "cpu", epoch, scaler, None, args=args
            )
        scores = engine.evaluate(held_out_batches(), model, "cpu", cls_features=head)
        found[head] = {
            "weight": few(model.head[-1].weight), "bias": model.head[-1].bias.tolist(),
            "running_mean": few(norm.running_mean), "running_var": few(norm.running_var),
            "query": few(model.head[0].attention_predictor[0].weight) if head == "abmilp" else None,
            "acc1": scores["acc1"], "acc5": scores["acc5"], "loss": scores["loss"],
        }  # fmt: skip
    return found


def localization(folder: Path) -> dict:
    """Of all images: how many are found at every threshold and IoU, and the accuracies at the best threshold; by the
    largest contour (V1) and by any (V2)."""
    del sys.modules["util"]  # of beyond_cls
    sys.path.insert(0, str(folder))
    evaluation, inference = map(importlib.import_module, ("evaluation", "inference"))
    images = {str(index): image for index, image in enumerate(located())}
    found = {}
    with tempfile.TemporaryDirectory() as lists:
        for name, lines in (
            ("image_ids", images), ("image_sizes", [",".join(map(str, (i, *one.size))) for i, one in images.items()]),
            ("localization", [",".join(map(str, (i, *box))) for i, one in images.items() for box in one.boxes]),
        ):  # fmt: skip
            (Path(lists) / name).with_suffix(".txt").write_text("".join(f"{line}\n" for line in lines))
        for version, step in itertools.product((1, 2), THRESHOLD_STEPS):
            evaluator = evaluation.BoxEvaluator(
                metadata=evaluation.configure_metadata(lists), dataset_name="ILSVRC", split="val", mask_root="",
                cam_threshold_list=list(np.arange(0, 1, step)), iou_threshold_list=[30, 50, 70],
                multi_contour_eval=version == 2,
            )  # fmt: skip
            for name, image in images.items():
                resized = cv2.resize(image.weights, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_CUBIC)
                evaluator.accumulate(inference.normalize_scoremap(resized), name)
            counts = [evaluator.num_correct[iou].astype(int).tolist() for iou in evaluator.iou_threshold_list]
            found[f"V{version} {step}"] = {"found": counts if step > 0.001 else None, "best": evaluator.compute()}
    return found


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sys.modules["wandb"] = types.SimpleNamespace(run=None)  # imported, not used without a run
    np.float = float  # MAE's name for it, gone from NumPy
    torch.Tensor.cuda = lambda self, *_, **__: self  # Kernel_SA-AbMILP makes its parameters on a GPU
    from torchvision.transforms import functional as F

    F._get_image_size = F.get_image_size  # MAE's name for it, gone from torchvision
    sys.path[:0] = [str(args.site), str(args.beyond_cls)]
    models_vit, models_simmim, heads, engine, analysis = map(
        importlib.import_module, ("models_vit", "models_simmim", "abmilp", "engine_finetune", "main_attention_stats")
    )
    import timm
    import util.misc as misc

    found = {"timm": timm.__version__, "torch": torch.__version__.partition("+")[0]}
    for name, module, function in (
        ("lars", "lars", lars), ("schedule", "lr_sched", schedule), ("crop", "crop", crop),
        ("positions", "pos_embed", positions),
    ):  # fmt: skip
        found[name] = function(importlib.import_module(f"util.{module}"))
        assert found[name] == function(by_path(args.mae / "util" / f"{module}.py")), f"MAE's {module} is another"
    found["abmilp"] = abmilp(heads)
    found["gated attention"] = bag_attention(by_path(args.ilse / "model.py").GatedAttention(), 500)
    sys.path.insert(0, str(args.sa))
    found["residual self-attention"] = bag_attention(by_path(args.sa / "model.py").Attention(self_att=True), 512)
    found["statistics"] = statistics(analysis, vit(models_vit, oracle=False, num_classes=CLASSES))
    simmim = models_simmim.VisionTransformerSimMIM(
        **VIT, num_classes=0, qkv_bias=True, init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
        use_mean_pooling=False, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    found["simmim"] = {"shapes": shapes_of(simmim), **statistics(analysis, fill(simmim).eval())}
    found["features"] = features(models_vit)
    optimizers = {"lars": importlib.import_module("util.lars").LARS, "sgd": torch.optim.SGD}
    found["probing"] = probing(models_vit, heads, engine, misc, optimizers)
    mae = by_path(args.mae / "models_vit.py")
    with torch.no_grad():
        found["mae"] = few(vit(mae, num_classes=CLASSES).forward_features(draw("images", 3, 3, 32, 32)))
    found["localization"] = localization(args.wsol)
    lines = [f"{json.dumps(name)}: {json.dumps(shortened(values))}" for name, values in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("site", "beyond_cls", "mae", "ilse", "sa", "wsol"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    main(parser.parse_args())
