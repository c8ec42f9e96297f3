"""CATALOGUE: the published encoders by name, and the download of their files. Importable without torch."""

import contextlib
import hashlib
import http.client
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from tqdm import tqdm

from encoders.architectures import FROM_FILE
from encoders.families import FAMILIES
from util.choices import instead_of, nearest
from util.files import atomic_path
from util.progress import log
from util.seeding import stable_seed


class Publication(NamedTuple):
    """A method: its paper, and under what licence its authors publish the weights."""

    title: str
    arxiv: str
    licence: str


class Figure(NamedTuple):
    """A published top-1 accuracy on ImageNet-1k, in per cent."""

    top1: float
    features: str  # what was classified
    source: str = "authors"  # in the protocol of the weights' own authors; or where "Beyond [cls]" has it

    def __str__(self) -> str:
        return f"{self.top1:.1f} {self.features} ({self.source})"


class CatalogueEntry(NamedTuple):
    """A published file. Preprocessing is the family's (FAMILIES); all were trained at, or for, 224 pixels."""

    family: str
    model: str  # a name of models_vit.ARCHITECTURES
    url: str | None  # None where a browser is needed: then `page` says where
    md5: str | None = None  # first characters of the hash, where the authors publish one
    figures: tuple[Figure, ...] = ()
    page: str | None = None

    @property
    def publication(self) -> str:
        """A name of PUBLICATIONS: the family's, without what distinguishes the families of one paper."""
        return self.family.removesuffix("_mean").removesuffix("_ft").removesuffix("_d2v2")


PUBLICATIONS = {
    "mae": Publication("MAE", "2111.06377", "CC-BY-NC 4.0"),
    "simmim": Publication("SimMIM", "2111.09886", "MIT"),
    "beitv2": Publication("BEiT-v2", "2208.06366", "MIT"),
    "maskfeat": Publication("MaskFeat", "2112.09133", "Apache-2.0"),
    "ijepa": Publication("I-JEPA", "2301.08243", "CC-BY-NC 4.0"),
    "capi": Publication("CAPI", "2502.08769", "Apache-2.0"),
    "data2vec": Publication("data2vec", "2202.03555", "CC-BY-NC"),
    "dino": Publication("DINO", "2104.14294", "Apache-2.0"),
    "mocov3": Publication("MoCo-v3", "2104.02057", "CC-BY-NC 4.0"),
    "ibot": Publication("iBOT", "2111.07832", "Apache-2.0"),
    "msn": Publication("MSN", "2204.07141", "CC-BY-NC 4.0"),
    "mim_refiner": Publication("MIM-Refiner", "2402.10093", "MIT"),
    "dinov2": Publication("DINOv2", "2304.07193", "Apache-2.0"),
    "dinov2_reg": Publication("DINOv2 with registers", "2309.16588", "Apache-2.0"),
}

META = "https://dl.fbaipublicfiles.com"
BEIT = "https://github.com/addf400/files/releases/download/BEiT-v2"
IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"
REFINER = "https://ml.jku.at/research/mimrefiner/download"
DRIVE = "https://drive.google.com/file/d"
T7, V1 = "paper, Table 7", "paper v1, Fig. 1"  # of "Beyond [cls]"

CATALOGUE = {
    "mae_vit_base_patch16": CatalogueEntry("mae", "vit_base_patch16", f"{META}/mae/pretrain/mae_pretrain_vit_base.pth",
        md5="8cad7c", figures=(Figure(67.8, "[cls]"), Figure(71.6, "AbMILP", T7))),
    "mae_vit_large_patch16": CatalogueEntry("mae", "vit_large_patch16",
        f"{META}/mae/pretrain/mae_pretrain_vit_large.pth", md5="b8b06e",
        figures=(Figure(76.0, "[cls]"), Figure(77.4, "AbMILP", T7))),
    "mae_vit_huge_patch14": CatalogueEntry("mae", "vit_huge_patch14", f"{META}/mae/pretrain/mae_pretrain_vit_huge.pth",
        md5="9bdbb0", figures=(Figure(77.2, "[cls]"), Figure(78.1, "AbMILP", T7))),
    # named in the code of "Beyond [cls]" only
    "mae_vit_base_patch16_decoder": CatalogueEntry("mae", "vit_base_patch16",
        f"{META}/mae/visualize/mae_visualize_vit_base.pth"),
    "mae_vit_large_patch16_decoder": CatalogueEntry("mae", "vit_large_patch16",
        f"{META}/mae/visualize/mae_visualize_vit_large.pth"),
    "mae_vit_large_patch16_decoder_gan": CatalogueEntry("mae", "vit_large_patch16",
        f"{META}/mae/visualize/mae_visualize_vit_large_ganloss.pth"),
    "mae_ft_mean_vit_base_patch16": CatalogueEntry("mae_ft_mean", "vit_base_patch16",
        f"{META}/mae/finetune/mae_finetuned_vit_base.pth", md5="1b25e9", figures=(Figure(83.664, "fine-tuned"),)),
    "mae_ft_mean_vit_large_patch16": CatalogueEntry("mae_ft_mean", "vit_large_patch16",
        f"{META}/mae/finetune/mae_finetuned_vit_large.pth", md5="51f550", figures=(Figure(85.952, "fine-tuned"),)),
    "mae_ft_mean_vit_huge_patch14": CatalogueEntry("mae_ft_mean", "vit_huge_patch14",
        f"{META}/mae/finetune/mae_finetuned_vit_huge.pth", md5="2541f2", figures=(Figure(86.928, "fine-tuned"),)),
    "simmim_vit_base_patch16": CatalogueEntry("simmim", "vit_base_patch16", None,
        figures=(Figure(56.7, "mean patch of block 8"),), page=f"{DRIVE}/1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw/view"),
    "simmim_ft_vit_base_patch16": CatalogueEntry("simmim_ft", "vit_base_patch16", None,
        figures=(Figure(83.8, "fine-tuned"),), page=f"{DRIVE}/1fKgDYd0tRgyHyTnyB1CleYxjo0Gn5tEB/view"),
    "beitv2_vit_base_patch16": CatalogueEntry("beitv2", "vit_base_patch16", f"{BEIT}/beitv2_base_patch16_224_pt1k.pth",
        figures=(Figure(78.9, "[cls]", V1), Figure(80.9, "AbMILP", T7))),
    "beitv2_vit_base_patch16_300e": CatalogueEntry("beitv2", "vit_base_patch16",
        f"{BEIT}/beitv2_base_patch16_224_pt1k_300e.pth"),
    "beitv2_vit_large_patch16": CatalogueEntry("beitv2", "vit_large_patch16",
        f"{BEIT}/beitv2_large_patch16_224_pt1k.pth"),
    "maskfeat_vit_base_patch16": CatalogueEntry("maskfeat", "vit_base_patch16",
        f"{META}/pyslowfast/masked_models/in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth"),
    "maskfeat_vit_large_patch16": CatalogueEntry("maskfeat", "vit_large_patch16",
        f"{META}/pyslowfast/masked_models/in1k_VIT_L_MaskFeat_PT_epoch_01600.pyth"),
    "ijepa_vit_huge_patch14": CatalogueEntry("ijepa", "vit_huge_patch14", f"{META}/ijepa/IN1K-vit.h.14-300e.pth.tar",
        figures=(Figure(79.2, "AbMILP", T7),)),
    "ijepa_vit_huge_patch14_in22k": CatalogueEntry("ijepa", "vit_huge_patch14",
        f"{META}/ijepa/IN22K-vit.h.14-900e.pth.tar"),
    "capi_vit_large_patch14": CatalogueEntry("capi", "vit_large_patch14", f"{META}/capi/capi_vitl14_in1k.pth",
        figures=(Figure(82.9, "attentive probe"), Figure(82.4, "AbMILP", T7))),
    "capi_vit_large_patch14_in22k": CatalogueEntry("capi", "vit_large_patch14", f"{META}/capi/capi_vitl14_i22k.pth",
        figures=(Figure(83.6, "attentive probe"),)),
    "capi_vit_large_patch14_lvd": CatalogueEntry("capi", "vit_large_patch14", f"{META}/capi/capi_vitl14_lvd.pth",
        figures=(Figure(83.8, "attentive probe"),)),
    "capi_vit_large_patch14_p205": CatalogueEntry("capi", "vit_large_patch14", f"{META}/capi/capi_vitl14_p205.pth",
        figures=(Figure(79.2, "attentive probe"),)),
    "data2vec_vit_base_patch16": CatalogueEntry("data2vec", "vit_base_patch16",
        f"{META}/fairseq/data2vec/data2vec_vision/base_800/checkpoint-799.pth"),
    "data2vec_vit_large_patch16": CatalogueEntry("data2vec", "vit_large_patch16",
        f"{META}/fairseq/data2vec/data2vec_vision/large_1600/checkpoint-799.pth"),
    "data2vec_vit_large_patch16_800e": CatalogueEntry("data2vec", "vit_large_patch16",
        f"{META}/fairseq/data2vec/data2vec_vision/large_800/checkpoint-799.pth"),
    "dino_vit_small_patch16": CatalogueEntry("dino", "vit_small_patch16",
        f"{META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        figures=(Figure(77.0, "[cls] of 4 blocks"),)),
    "dino_vit_small_patch8": CatalogueEntry("dino", "vit_small_patch8",
        f"{META}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
        figures=(Figure(79.7, "[cls] of 4 blocks"),)),
    "dino_vit_base_patch16": CatalogueEntry("dino", "vit_base_patch16",
        f"{META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        figures=(Figure(78.2, "[cls] + mean patch"),)),
    "dino_vit_base_patch8": CatalogueEntry("dino", "vit_base_patch8",
        f"{META}/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
        figures=(Figure(80.1, "[cls] + mean patch"),)),
    # 12 heads, unlike everybody else's ViT-S
    "mocov3_vit_small_patch16": CatalogueEntry("mocov3", "vit_small_patch16",
        f"{META}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", figures=(Figure(73.2, "[cls]"),)),
    "mocov3_vit_base_patch16": CatalogueEntry("mocov3", "vit_base_patch16",
        f"{META}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
        figures=(Figure(76.7, "[cls]"), Figure(75.1, "[cls]", V1), Figure(75.1, "AbMILP", V1))),
    "ibot_vit_small_patch16": CatalogueEntry("ibot", "vit_small_patch16", f"{IBOT}/vits_16/checkpoint_teacher.pth",
        figures=(Figure(77.9, "own features"),)),
    "ibot_vit_base_patch16": CatalogueEntry("ibot", "vit_base_patch16", f"{IBOT}/vitb_16/checkpoint_teacher.pth",
        figures=(Figure(79.5, "own features"), Figure(77.8, "[cls]", V1), Figure(77.9, "AbMILP", V1))),
    "ibot_vit_base_patch16_rand": CatalogueEntry("ibot", "vit_base_patch16",
        f"{IBOT}/vitb_16_rand_mask/checkpoint_teacher.pth", figures=(Figure(79.8, "own features"),)),
    "ibot_vit_large_patch16": CatalogueEntry("ibot", "vit_large_patch16", f"{IBOT}/vitl_16/checkpoint_teacher.pth",
        figures=(Figure(81.0, "own features"),)),
    "ibot_vit_large_patch16_rand": CatalogueEntry("ibot", "vit_large_patch16",
        f"{IBOT}/vitl_16_rand_mask/checkpoint_teacher.pth", figures=(Figure(81.3, "own features"),)),
    "msn_vit_small_patch16": CatalogueEntry("msn", "vit_small_patch16", f"{META}/msn/vits16_800ep.pth.tar"),
    "msn_vit_base_patch16": CatalogueEntry("msn", "vit_base_patch16", f"{META}/msn/vitb16_600ep.pth.tar"),
    "msn_vit_large_patch16": CatalogueEntry("msn", "vit_large_patch16", f"{META}/msn/vitl16_600ep.pth.tar"),
    "msn_vit_base_patch4": CatalogueEntry("msn", "vit_base_patch4", f"{META}/msn/vitb4_300ep.pth.tar"),
    "msn_vit_large_patch7": CatalogueEntry("msn", "vit_large_patch7", f"{META}/msn/vitl7_200ep.pth.tar"),
    "mim_refiner_mae_vit_large_patch16": CatalogueEntry("mim_refiner", "vit_large_patch16",
        f"{REFINER}/maerefined_l16.th"),
    "mim_refiner_mae_vit_huge_patch14": CatalogueEntry("mim_refiner", "vit_huge_patch14",
        f"{REFINER}/maerefined_h14.th"),
    "mim_refiner_mae_vit_2b_patch14": CatalogueEntry("mim_refiner", "vit_2b_patch14",
        f"{REFINER}/maerefined_twob14.th"),
    "mim_refiner_d2v2_vit_large_patch16": CatalogueEntry("mim_refiner_d2v2", "vit_large_patch16",
        f"{REFINER}/d2v2refined_l16.th"),
    "mim_refiner_d2v2_vit_huge_patch14": CatalogueEntry("mim_refiner_d2v2", "vit_huge_patch14",
        f"{REFINER}/d2v2refined_h14.th"),
    "mim_refiner_dbot_vit_large_patch16": CatalogueEntry("mim_refiner", "vit_large_patch16",
        f"{REFINER}/dbotrefined_l16.th"),
    "mim_refiner_dbot_vit_huge_patch14": CatalogueEntry("mim_refiner", "vit_huge_patch14",
        f"{REFINER}/dbotrefined_h14.th"),
    "mim_refiner_crossmae_vit_large_patch16": CatalogueEntry("mim_refiner", "vit_large_patch16",
        f"{REFINER}/crossmaerefined_l16.th"),
    "dinov2_vit_small_patch14": CatalogueEntry("dinov2", "vit_small_patch14",
        f"{META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", figures=(Figure(81.1, "own features"),)),
    "dinov2_vit_base_patch14": CatalogueEntry("dinov2", "vit_base_patch14",
        f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", figures=(Figure(84.5, "own features"),)),
    "dinov2_vit_large_patch14": CatalogueEntry("dinov2", "vit_large_patch14",
        f"{META}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", figures=(Figure(86.3, "own features"),)),
    "dinov2_vit_small_patch14_reg": CatalogueEntry("dinov2_reg", "vit_small_patch14",
        f"{META}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", figures=(Figure(80.9, "own features"),)),
    "dinov2_vit_base_patch14_reg": CatalogueEntry("dinov2_reg", "vit_base_patch14",
        f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", figures=(Figure(84.6, "own features"),)),
    "dinov2_vit_large_patch14_reg": CatalogueEntry("dinov2_reg", "vit_large_patch14",
        f"{META}/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", figures=(Figure(86.7, "own features"),)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# from a name to a file
# ---------------------------------------------------------------------------------------------------------------------


def known_family(finetune: str, model: str, family: str | None) -> str | None:
    """The family that the arguments name, or the catalogue does; None where it is to be detected ("auto").

    ValueError where they contradict each other.
    """
    family = named_family(family)
    if finetune in CATALOGUE:
        entry = CATALOGUE[finetune]
        if model not in (entry.model, FROM_FILE):
            raise ValueError(f"--finetune {finetune} is no {model}: write --model {entry.model}")
        family = family or entry.family
    return family


def named_family(family: str | None) -> str | None:
    """A name of FAMILIES, or None for "auto"; ValueError for a name that does not exist."""
    if family not in (None, "auto", *FAMILIES):
        raise ValueError(f"unknown family {family!r}: {instead_of(family, ['auto', *FAMILIES])}")
    return None if family == "auto" else family


def fetch_weights(finetune: str, offline: bool = False) -> Path | None:
    """The file that --finetune names, downloaded to torch.hub's folder if need be; None for a timm model's name.

    offline: ValueError instead of a download.
    """
    if (path := Path(finetune)).exists():
        if prefix := next((prefix for file, prefix in MODEL_FOLDERS.items() if (path / file).is_file()), None):
            raise ValueError(f"--finetune {finetune} is the folder of a model: write --finetune {prefix}:{finetune}")
        return path
    if finetune in CATALOGUE:
        entry = CATALOGUE[finetune]
        if entry.url is None:
            raise ValueError(
                f"--finetune {finetune}: its authors offer it to browsers only: fetch {entry.page} and write "
                f"--finetune PATH_OF_THE_FILE --family {entry.family} --model {entry.model}"
            )
        return download(entry.url, entry.md5, offline)
    if urlparse(finetune).scheme in ("http", "https", "file"):
        return download(finetune, None, offline)
    import timm  # a second to import, and few runs need it

    if timm.is_model(finetune.split(".")[0]):
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", finetune):
        raise ValueError(
            f"--finetune {finetune}: no such file; a model of the Hugging Face hub is written hf:{finetune} "
            f"(or timm:hf-hub:{finetune})"
        )
    raise ValueError(
        f"--finetune {finetune}: no such file, and neither a timm model, a URL nor a name of the catalogue: "
        f"{nearest(finetune, CATALOGUE)}scripts/list_encoders.py prints it"
    )


# files that show which library saved a folder -> the prefix of --finetune
MODEL_FOLDERS = {"open_clip_config.json": "open_clip", "config.json": "hf"}


def families_called(path: Path) -> set[str]:
    """Families that have a published file of this name, or whose download is at this path."""
    urls = [(entry.family, entry.url) for entry in CATALOGUE.values() if entry.url]
    return {family for family, url in urls if path.name == Path(urlparse(url).path).name or path == cache_path(url)}


def cache_path(url: str) -> Path:
    """Where the file behind a URL is kept: in torch.hub's checkpoint folder."""
    import torch

    # several authors give all of their files one name (iBOT: checkpoint_teacher.pth), so the URL is part of this one
    name = f"{stable_seed(url):016x}-{Path(urlparse(url).path).name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def download(url: str, md5: str | None, offline: bool = False) -> Path:
    """The file behind a URL, from the cache where it is there; whole or absent, its published hash checked."""
    target = cache_path(url)
    if target.exists():  # perhaps put there by hand
        check_md5(target, md5, url)
        return target
    if offline and urlparse(url).scheme != "file":
        raise ValueError(f"--offline, and {url} is not in the cache: fetch it elsewhere and put it at {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:  # of this process alone: two may download at once
            transfer(url, temporary)
            check_md5(temporary, md5, url)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot download {url}: {reason}; or fetch it yourself and put it at {target}") from error
    return target


def transfer(url: str, target: Path) -> None:
    """Write what is behind a URL to a file. OSError where it does not come whole."""
    log.info("downloading %s", url)
    request = Request(url, headers={"User-Agent": "beyond_cls"})  # some servers turn Python's own name away
    with urlopen(request, timeout=60) as response, open(target, "wb") as file:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server answers with a web page")
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(
            total=total, desc=Path(urlparse(url).path).name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        ) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def check_md5(path: Path, prefix: str | None, url: str) -> None:
    if not prefix:
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if not digest.startswith(prefix):
        raise ValueError(
            f"{url}: the file's md5 is {digest}, published as {prefix}...: it is damaged or was replaced"
            + (f"; remove {path}" if path == cache_path(url) else "")
        )


@contextlib.contextmanager
def hugging_face_offline(offline: bool) -> Iterator[None]:
    """Within the block, Hugging Face's library, which timm downloads with, serves from its cache only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline  # read from the environment once, when it was imported
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
