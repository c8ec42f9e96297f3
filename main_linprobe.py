"""Train and test linear probes on the frozen tokens of one encoder; cli/linprobe.toml has the arguments."""

from cli.arguments import command_line
from cli.console import run_main
from cli.linprobe import check, get_args_parser

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = command_line(get_args_parser(), check)

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cli import linprobe as flags
from cli.arguments import build_split_images, identity, loading, plain
from cli.encoder_arguments import build_oracle, frozen_encoder, precision
from cli.session import peak_rate, plan, schedule, session, write_results
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches, hold_out
from data_sets.table import DATASETS
from data_sets.views import eval_transform, train_transform
from encoders.architectures import check_blocks
from engine_linprobe import FrozenTokens, Probing, evaluate, nearest_neighbours
from models_vit import VisionTransformer, compile_blocks
from probing import results as report
from probing.bank import ProbeBank, ProbeSpec
from probing.feature_cache import CachedTokens, FeatureCache, Part
from probing.heads import own_block
from probing.logreg import Fits, Fitting, Shots, describe, tasks
from probing.predictions import FILE, PredictionKeeper, mark_untrained
from runtime.folder import RunFolder
from runtime.provenance import code_digest, provenance
from runtime.training import Training
from util.distributed import require_equal
from util.files import digest
from util.lars import LARS
from util.progress import log
from util.scores import MultiLabelTally, Tally

NEIGHBOURS = (1, 5, 20)  # of k-NN without --knn, if features are cached


def main(args: argparse.Namespace) -> None:
    with session(args, check) as (world, folder):
        # ---- labelled images, a frozen encoder, a bank of probes on its tokens, and what the bank reads
        setup = Setup(args, world.device)
        bank, metric, fits = setup.bank, setup.metric, setup.fits
        evaluated, images = setup.facts()
        require_equal(evaluated | images)
        shots = Shots(args.shots, args.episodes, args.seed)
        batches = setup.batches(shots)
        setup.open_inputs(batches)

        # ---- recipe: LARS, a rate for each probe, warm-up and half-cosine by optimizer step
        lrs = [peak_rate(args, spec.blr, batches.effective) for spec in bank.specs]
        optimizer = build_optimizer(args, bank.specs, bank.parameter_groups(lrs))
        probing = Probing(bank, setup.tokens, optimizer, world.device, setup.multi_label, args.bn_group, setup.seeds)
        recipe = plan(args), probing, optimizer, schedule(args), setup.loaders["train"], batches
        settings = folder, identity(args, evaluated | images)
        if fits:
            training = Fitting(setup.cache, args.l2, shots, metric, *recipe, *settings)
        else:
            training = Training(*recipe, *settings, args.start_epoch)
        training.resume(args.resume, args.eval, ["final_norm", *evaluated])
        kept = probing.names, setup.classes, setup.multi_label, world.device
        keeper = PredictionKeeper(*kept) if args.save_predictions else None
        run = setup.record(batches, dict(zip(probing.names, lrs, strict=True)), images)
        if args.eval:
            report.log_scores(setup.score("test", keeper))
            write_predictions(folder, keeper, bank.specs, run, {})
            return

        # ---- epochs
        training.start(run)
        report.warn_of_choices(bank.specs, bool(setup.held_out))
        if (steps := batches.steps * args.epochs) < flags.FEW_STEPS and not fits:
            log.warning("only %d optimizer steps: for so few images, %s", steps, flags.small_command(args))
        if setup.cache is not None:
            setup.cache.fill(args.batch_size, **setup.load.keywords)
        report.log_start(run, bank)
        watched = "val" if setup.held_out and not fits else "test"  # held-out images are among those of a fit
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                stats = stats._replace(images_per_second=stats.images_per_second * len(batches.seeds))
                record = {"epoch": epoch, "train_loss": stats.losses, **stats.costs()}
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    record[watched] = setup.score(watched)
                    losses = dict(zip(probing.names, stats.losses, strict=True))
                    training.history.append({"epoch": epoch, "train_loss": losses, watched: record[watched]})
                best = report.best_probe(record.get(watched), metric, watched)
                log.info("epoch %d: %s%s", epoch, best, stats.speed())
                folder.log_line(record)
                figures = record.get(watched, {}).items()
                training.end_epoch({f"{watched}_{metric}/{name}": scores[metric] for name, scores in figures})

            # ---- results of the last epoch
            final = setup.score("test", keeper) if setup.held_out or keeper else training.history[-1]["test"]
            results = report.summary(bank, training.history, training.diverged(), watched, metric, final)
            for name, fit in training.facts.items() if fits else ():
                results[name] |= describe(fit)
            mark_untrained(results, training.history[-1].get("train_loss", {}), *setup.labels(), metric)
            write_predictions(folder, keeper, bank.specs, run, results)
            if neighbours := setup.neighbours():
                run["knn"] = neighbours
                report.log_neighbours(neighbours)
            write_results(folder, training, {"probes": results}, run)
        report.log_summary(results, metric, args.report)
        report.warn_of_edges(results)


class Setup:
    """What the arguments name: labelled images, a frozen encoder, probes on its tokens, and what these read."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.metric = flags.headline(args)
        # of data order and augmentation; none if all probes use those of --seed
        self.seeds = () if args.seeds_vary == "weights" else tuple(args.seeds or [args.seed])
        self.multi_label, self.fits = DATASETS[args.dataset].multi_label, "logreg" in args.optimizer
        self.train, self.test, self.classes = build_split_images(args)
        # with --val_fraction, rates are chosen on training images that are held out
        self.kept, self.held_out = hold_out(self.train.targets, args.val_fraction, args.seed)
        if max(args.knn, default=0) > len(self.kept):
            raise ValueError(f"--knn {max(args.knn)}: must be <= {len(self.kept)}, the number of training images")

        self.encoder, self.size = frozen_encoder(args)
        backbone, amp = self.encoder.backbone.to(device), precision(args.amp)
        if args.final_norm and isinstance(backbone.norm, torch.nn.Identity):
            family = self.encoder.record["family"]
            raise ValueError(f"--final_norm: encoders of family {family} have no last norm; omit it")
        if args.compile:
            compile_blocks(backbone)
        options = args.init, bool(self.seeds), flags.head_precision(args, device)
        sizes = backbone.grid_of(self.size, self.size), self.classes
        bank = self.bank = ProbeBank(probe_specs(args, backbone), backbone, *sizes, *options).to(device)
        self.oracle = build_oracle(args, self.encoder, self.size, amp).to(device) if bank.needs.oracle else None
        self.frozen = FrozenTokens(backbone, bank.blocks, amp, args.final_norm, bank.needs, self.oracle)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Digests of what must be equal when a checkpoint is evaluated; and of what, too, when it is resumed."""
        facts = self.encoder.facts(self.size) | (self.oracle.facts if self.oracle else {})
        facts["class names"] = digest(self.train.classes)
        return facts, {"training images": fingerprint(self.train), "test images": fingerprint(self.test)}

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the images that the probes were trained on, and of the test images."""
        return np.asarray(self.train.targets)[self.kept], np.asarray(self.test.targets)

    def batches(self, shots: Shots) -> GlobalBatches | Fits:
        """Order and augmentation depend on (seed, epoch, sample) alone."""
        if self.fits:
            return Fits(len(self.kept), len(tasks(self.bank.specs, shots)))
        args, options = self.args, {"indices": self.kept, "group": self.args.bn_group, "seeds": self.seeds}
        return GlobalBatches(len(self.train), args.batch_size, args.accum_iter, args.seed, **options)

    def open_inputs(self, batches: GlobalBatches | Fits) -> None:
        """Prepare loaders of each part of the images; with --cache_views, of features that are computed once."""
        args, self.parts = self.args, self._parts()
        orders = {name: EvaluationBatches(len(p.dataset), args.batch_size, p.indices) for name, p in self.parts.items()}
        orders["train"] = batches
        self.load = functools.partial(build_loader, **loading(args, self.device))
        if not args.cache_views or args.eval:
            self.tokens, self.cache = self.frozen, None
            self.loaders = {name: self.load(part.dataset, orders[name]) for name, part in self.parts.items()}
        else:
            self.tokens = CachedTokens(self.frozen, self.bank, self.size, self.device)
            self.cache = FeatureCache(self.tokens, self.parts, args.cache_dir, self._cache_key())
            self.loaders = {name: self.cache.loader(name, order) for name, order in orders.items()}

    def _parts(self) -> dict[str, Part]:
        """Training images are augmented, test and held-out images are not."""
        args, pixels = self.args, {**self.encoder.pixels, "loader": self.args.loader}
        augment = train_transform(self.size, crop=args.crop, hflip=not args.no_hflip, **pixels)
        plain = eval_transform(self.size, **pixels)
        keyed = functools.partial(KeyedDataset, seed=args.seed, on_bad_image=args.on_bad_image)
        seeds = self.seeds if "views" in flags.seeds_vary(args) else ()
        train = keyed(self.train, augment, train=True, indices=self.kept)
        parts = {"train": Part(train, self.kept, args.cache_views, seeds)}
        parts["test"] = Part(keyed(self.test, plain), range(len(self.test)))
        return parts | ({"val": Part(keyed(self.train, plain), self.held_out)} if self.held_out else {})

    def _cache_key(self) -> dict:
        """Everything that cached features depend on; nothing for a cache in memory, which needs no name."""
        if self.args.cache_dir is None:
            return {}
        versions, libraries = provenance(self.device)["versions"], ("torch", "torchvision", "pillow", "numpy")
        networks = {"encoder": self.encoder.facts(self.size), "oracle": self.oracle and self.oracle.facts}
        images = [fingerprint(part, local=True) for part in (self.train, self.test)]
        relevant = {name: value for name, value in plain(self.args).items() if name not in flags.NOT_IN_FEATURES}
        inputs = {"images": images, "held out": self.held_out, "arguments": relevant}
        code = {"code": code_digest(), "versions": {name: versions[name] for name in libraries}}
        return {**networks, **inputs, "device": self.device.type, **code}

    def record(self, batches: GlobalBatches | Fits, lrs: dict[str, float], images: dict[str, str]) -> dict[str, Any]:
        """What args.json and results.json say about the run. images: their fingerprints."""
        args, names = self.args, list(map(str, self.train.classes))
        record = {"args": plain(args), "encoder": self.encoder.record, "effective_batch": batches.effective}
        record |= {"bn_group": args.bn_group or args.batch_size, "steps_per_epoch": batches.steps, "lr": lrs}
        record |= {"n_train": len(self.kept), "n_val": len(self.held_out), "n_test": len(self.test)}
        record |= {"classes": self.classes, "class_names": names, "headline": self.metric}
        record |= {"train_images": images["training images"], "test_images": images["test images"]}
        record |= {"seeds_vary": flags.seeds_vary(args), "oracle": self.oracle and self.oracle.record}
        return record | provenance(self.device)

    def score(self, part: str, keeper: PredictionKeeper | None = None) -> dict[str, dict]:
        """{probe: its scores} on a part of the images. keeper: collects the predictions."""
        tally = (MultiLabelTally if self.multi_label else Tally)(len(self.bank.specs), self.classes, self.device)
        scores = evaluate(self.bank, self.tokens, self.loaders[part], self.device, tally, keeper, part)
        return {spec.name: score._asdict() for spec, score in zip(self.bank.specs, scores, strict=True)}

    def neighbours(self) -> dict[str, dict]:
        """k-NN scores on images without augmentation: of --knn; if such features are cached, at least of NEIGHBOURS."""
        args, is_cached = self.args, self.cache is not None and self.args.crop == "center"
        ks = args.knn or [k for k in NEIGHBOURS if is_cached and not self.multi_label and k <= len(self.kept)]
        if not ks:
            return {}
        order = EvaluationBatches(len(self.train), args.batch_size, self.kept)
        if is_cached:
            tokens, train, test = self.tokens, self.cache.loader("train", order), self.loaders["test"]
        else:
            shown = self.parts["test"].dataset
            train = KeyedDataset(self.train, shown.transform, args.seed, on_bad_image=args.on_bad_image)
            tokens, train = self.frozen, self.load(train, order)
            test = self.load(shown, EvaluationBatches(len(shown), args.batch_size))
        return nearest_neighbours(self.bank, tokens, train, test, self.device, ks, self.classes)


def probe_specs(args: argparse.Namespace, backbone: VisionTransformer) -> list[ProbeSpec]:
    """The probes that the arguments name. ValueError for what does not exist or does not fit the encoder."""
    blocks = args.return_block if args.return_block is not None else [backbone.depth - 1]
    check_blocks(blocks, backbone.depth)
    pairs = []
    for head in flags.heads(args, backbone.depth):
        own = own_block(head)
        pairs += [(head, block) for block in (dict.fromkeys(blocks) if own is None else [own])]
    settings = itertools.product(pairs, args.optimizer, args.blr, args.seeds or [args.seed])
    return [ProbeSpec(*pair, blr, seed, optimizer, args.lr) for pair, optimizer, blr, seed in settings]


def build_optimizer(args: argparse.Namespace, specs: Sequence[ProbeSpec], groups: list[dict]) -> LARS:
    """One optimizer, with the rule of its probes in each group."""
    for group in groups:
        group |= flags.OPTIMIZERS[specs[group["rows"][0]].optimizer]
        if args.momentum is not None:
            group["momentum"] = args.momentum
    return LARS(groups, weight_decay=args.weight_decay)


def write_predictions(
    folder: RunFolder, keeper: PredictionKeeper | None, specs: Sequence[ProbeSpec], run: dict, results: dict[str, dict]
) -> None:
    """Write predictions.safetensors if predictions were kept, with the choices in `results`, if any."""
    if keeper is None:
        return
    probes = {spec.name: {"head": spec.head, **dataclasses.asdict(spec)} for spec in specs}
    for name, result in results.items():
        probes[name] |= {key: result[key] for key in ("chosen", "learned_nothing") if key in result}
    known = "headline", "seeds_vary", "test_images", "classes", "encoder", "command", "commit", "dirty"
    tensors, metadata = keeper.gather({"probes": probes, **{name: run[name] for name in known}})
    folder.save_tensors(FILE, tensors, metadata)


if __name__ == "__main__":
    run_main(main, ARGS)
