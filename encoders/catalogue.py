"""CATALOGUE: the published encoders by name (catalogue.toml), and the download of their files. Without torch."""

import hashlib
import http.client
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from encoders.architectures import FROM_FILE
from encoders.families import FAMILIES
from util.choices import instead_of, nearest
from util.files import atomic_path, without_credentials
from util.lazy import lazy
from util.progress import log
from util.seeding import stable_seed

torch = lazy("torch")
# files that show which library saved a folder -> the prefix of --finetune
MODEL_FOLDERS = {"open_clip_config.json": "open_clip", "config.json": "hf"}
LARGEST = 2**36  # bytes of a download: twice a file of 7 billion parameters in float32


class Publication(NamedTuple):
    title: str
    arxiv: str
    licence: str  # of the weights


class Figure(NamedTuple):
    """A published top-1 accuracy on ImageNet-1k, in per cent."""

    top1: float
    features: str  # that were classified
    source: str = "authors"  # of the weights, in their own protocol; or where "Beyond [cls]" has the figure

    def __str__(self) -> str:
        return f"{self.top1:.1f} {self.features} ({self.source})"


class CatalogueEntry(NamedTuple):
    """A published file. Preprocessing is the family's; all were trained at, or for, 224 pixels."""

    family: str
    model: str  # a name of models_vit.ARCHITECTURES
    url: str | None = None  # None if only a browser can download the file, from `page`
    md5: str | None = None  # first characters of the hash, if the authors publish it
    figures: tuple[Figure, ...] = ()
    page: str | None = None

    @property
    def publication(self) -> str:
        """A name of PUBLICATIONS: the family's, without what distinguishes the families of one paper."""
        return self.family.removesuffix("_mean").removesuffix("_ft").removesuffix("_d2v2")


TABLE = tomllib.loads((Path(__file__).parent / "catalogue.toml").read_text())
PUBLICATIONS = {name: Publication(*fields) for name, fields in TABLE.pop("publications").items()}
CATALOGUE = {
    name: CatalogueEntry(**{**entry, "figures": tuple(Figure(*figure) for figure in entry.get("figures", ()))})
    for name, entry in TABLE.items()
}


def known_family(finetune: str, model: str, family: str | None) -> str | None:
    """The family that arguments or catalogue name; None if it is to be detected. ValueError if they disagree."""
    if family not in (None, "auto", *FAMILIES):
        raise ValueError(f"unknown family {family!r}: {instead_of(family, ['auto', *FAMILIES])}")
    family = None if family == "auto" else family
    if finetune not in CATALOGUE:
        return family
    entry = CATALOGUE[finetune]
    if model not in (entry.model, FROM_FILE):
        raise ValueError(f"--finetune {finetune} is no {model}: write --model {entry.model}")
    return family or entry.family


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
                f"--finetune {finetune}: only a browser can download it, from {entry.page}; then write "
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
            f"--finetune {finetune}: no such file; a model of the Hugging Face hub is written hf:{finetune}"
        )
    raise ValueError(
        f"--finetune {finetune}: no such file, and neither a timm model, a URL nor a name of the catalogue: "
        f"{nearest(finetune, CATALOGUE)}scripts/list.py encoders prints it"
    )


def families_called(path: Path) -> set[str]:
    """Families that have a published file of this name, or whose download is at this path."""
    urls = [(entry.family, entry.url) for entry in CATALOGUE.values() if entry.url]
    return {family for family, url in urls if path.name == Path(urlparse(url).path).name or path == cache_path(url)}


def cache_path(url: str) -> Path:
    """Where a download is kept: in torch.hub's checkpoint folder.

    Several authors give all their files one name (iBOT: checkpoint_teacher.pth), so the URL is part of this name.
    """
    name = f"{stable_seed(url):016x}-{Path(urlparse(url).path).name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def download(url: str, md5: str | None, offline: bool = False) -> Path:
    """The file behind a URL, downloaded unless it is in the cache; whole or absent, its published hash checked."""
    target = cache_path(url)
    if target.exists():  # perhaps put there by hand
        check_md5(target, md5, url)
        return target
    if offline and urlparse(url).scheme != "file":
        raise ValueError(f"--offline, and {url} is not in the cache: fetch it elsewhere and put it at {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:  # of this process alone: two may download at once
            transfer(url, temporary, bool(md5))
            check_md5(temporary, md5, url)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot download {url}: {reason}; or fetch it yourself and put it at {target}") from error
    return target


class Redirects(HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        if urlparse(url).scheme not in ("http", "https"):
            raise OSError(f"the server redirects to {url}, which is neither http nor https")
        return super().redirect_request(request, response, code, message, headers, url)


def transfer(url: str, target: Path, hashed: bool) -> None:
    """Download to a file. OSError if it does not arrive whole; only a `hashed` one may come without its length."""
    log.info("downloading %s", without_credentials(url))
    request = Request(url, headers={"User-Agent": "beyond_cls"})  # some servers refuse Python's default
    with build_opener(Redirects).open(request, timeout=60) as response, open(target, "wb") as file:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server answers with a web page")
        length = response.headers.get("Content-Length", str(LARGEST) if hashed else "none")
        if not (length.isascii() and length.isdecimal() and int(length) <= LARGEST):
            raise OSError(f"the server states a length of {length}, so that a part would pass for the whole")
        bar = {"desc": Path(urlparse(url).path).name, "disable": not sys.stderr.isatty()}
        with tqdm.wrapattr(response, "read", total=int(length), **bar) as body:
            while file.tell() <= LARGEST and (chunk := body.read(1 << 20)):
                file.write(chunk)
        if file.tell() != int(length) and not (hashed and "Content-Length" not in response.headers):
            raise OSError(f"the connection ended after {file.tell():,} of {int(length):,} bytes")


def check_md5(path: Path, prefix: str | None, url: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest() if prefix else ""
    if not digest.startswith(prefix or ""):
        raise ValueError(
            f"{url}: the file's md5 is {digest}, published as {prefix}...: it is damaged or was replaced"
            + (f"; remove {path}" if path == cache_path(url) else "")
        )
