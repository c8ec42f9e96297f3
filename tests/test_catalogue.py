import functools
import hashlib
import http.server
import logging
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch

import models_vit
from cli.arguments import add_groups
from cli.console import Parser
from cli.encoder_arguments import build_encoder
from encoders.catalogue import CATALOGUE, PUBLICATIONS, CatalogueEntry, cache_path, download, fetch_weights
from encoders.families import FAMILIES

# ---- the table


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_entry_is_complete_and_can_be_quoted(name):
    entry = CATALOGUE[name]
    assert re.fullmatch(r"[a-z0-9_]+", name) and entry.model in name, f"{name} must contain {entry.model}"
    assert (entry.url is None) != (entry.page is None), f"{name}: either its file's url, or the page to fetch it from"
    assert urlparse(entry.url or entry.page).scheme == "https" and " " not in (entry.url or entry.page)
    assert entry.md5 is None or re.fullmatch(r"[0-9a-f]{6,32}", entry.md5)
    if entry.publication not in PUBLICATIONS:
        pytest.fail(f"encoders/catalogue.py: {name} is of {entry.publication!r}, which PUBLICATIONS lacks: add its "
                    "paper and licence", pytrace=False)  # fmt: skip
    paper = PUBLICATIONS[entry.publication]
    assert paper.title and paper.licence and re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    for figure in entry.figures:
        assert 0 < figure.top1 < 100 and figure.features and figure.source
    assert entry.family in FAMILIES and models_vit.default_input_size(entry.model) == 224


def test_no_file_is_listed_twice_and_equal_names_are_kept_apart():
    files = [entry.url or entry.page for entry in CATALOGUE.values()]
    assert len(set(files)) == len(files)
    urls = [entry.url for entry in CATALOGUE.values() if entry.url]
    assert len({Path(urlparse(url).path).name for url in urls}) < len(urls)  # checkpoint_teacher.pth, five times
    assert len({cache_path(url) for url in urls}) == len(urls)


def test_all_encoders_of_the_paper_are_there():
    methods = {
        PUBLICATIONS[entry.publication].title for entry in CATALOGUE.values() if entry.publication in PUBLICATIONS
    }
    assert methods == {paper.title for paper in PUBLICATIONS.values()}
    assert {"MAE", "SimMIM", "BEiT-v2", "MaskFeat", "I-JEPA", "CAPI", "DINO", "MoCo-v3", "iBOT"} <= methods


def test_files_offered_to_browsers_only_are_answered_with_the_page_and_the_flags():
    with pytest.raises(ValueError) as error:
        fetch_weights("simmim_vit_base_patch16")
    message = str(error.value)
    assert "https://drive.google.com/file/d/1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw/view" in message
    assert message.endswith("--finetune PATH_OF_THE_FILE --family simmim --model vit_base_patch16")


def test_a_misspelt_name_is_answered_with_similar_ones():
    with pytest.raises(ValueError, match=r"did you mean mae_vit_base_patch16"):
        fetch_weights("mae_vit_base_pach16")


# ---- downloads


DATA = bytes(range(256)) * 12_000  # three of the chunks that are read at once
MD5 = hashlib.md5(DATA).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if "absent" in self.path:
            self.send_error(404)
            return
        if "slow" in self.path:
            self.server.together.wait(20)  # until another process asks too
        redirected = re.search("to-([a-z]+)", self.path)
        self.send_response(302 if redirected else 200)
        if redirected:
            self.send_header("Location", f"{redirected[1]}://{self.headers['Host']}/w.pth")
        self.send_header("Content-Type", "text/html" if "page" in self.path else "application/octet-stream")
        stated = re.search("states-([^.]+)", self.path)
        if "unsized" not in self.path:
            self.send_header("Content-Length", unquote(stated[1]) if stated else str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:2_000_000] if "interrupted" in self.path else DATA)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.requests, running.together = [], threading.Barrier(2)
        running.handle_error = lambda *_: None  # clients that hang up
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


def contents(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in cache.iterdir()]


@pytest.mark.parametrize("name", ["sized", "unsized"])
def test_a_download_comes_whole_to_torch_hubs_folder_and_once(server, cache, name, caplog, capfd):
    url = f"{server.url}/{name}.pth?a=b"
    with caplog.at_level(logging.INFO, "beyond_cls"):
        path = download(url, MD5[:6])
    assert path.parent == cache and path.name.endswith(f"-{name}.pth") and contents(cache) == [DATA]
    assert f"downloading {server.url}/{name}.pth" in caplog.text
    assert capfd.readouterr().err == ""  # no progress bar in a log file
    server.requests.clear()
    assert download(url, MD5[:6]) == path == fetch_weights(url, offline=True)
    assert not server.requests


def test_a_redirect_to_http_is_followed_and_secrets_are_not_logged(server, cache, caplog):
    with caplog.at_level(logging.INFO, "beyond_cls"):
        assert download(f"{server.url}/to-http.pth?token=SECRET", None).read_bytes() == DATA
    assert "SECRET" not in caplog.text


def test_a_bar_shows_the_progress_on_a_terminal(server, cache, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    download(f"{server.url}/w.pth", None)
    assert "w.pth: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, reason",
    [
        ("interrupted", r"the connection ended after 2,000,000 of 3,072,000 bytes"),
        ("absent", r"HTTP Error 404: Not Found"),
        ("page", r"the server answers with a web page"),
        ("unsized", r"the server states a length of none, so that a part would pass for the whole"),
        ("states-12%20000", r"the server states a length of 12 000,.*"),
        ("states--5", r"the server states a length of -5,.*"),
        ("states-" + "9" * 30, r"the server states a length of 999.*"),
        ("to-ftp", r"the server redirects to ftp://.*/w.pth, which is neither http nor https"),
        ("to-file", r"HTTP Error 302.*"),
    ],
)
def test_incomplete_downloads_leave_no_file(server, cache, name, reason):
    url = f"{server.url}/{name}.pth"
    with pytest.raises(ValueError, match=rf"cannot download {url}: {reason}; or fetch it yourself and put it at /"):
        download(url, None)
    assert contents(cache) == []


def test_a_refused_connection_is_one_line(cache):
    with pytest.raises(ValueError, match=r"cannot download http://127.0.0.1:1/w.pth: .*refused"):
        download("http://127.0.0.1:1/w.pth", None)


def test_a_wrong_hash_is_refused_also_in_the_cache(server, cache):
    url = f"{server.url}/w.pth"
    with pytest.raises(ValueError, match=r"published as 000000\.\.\.: it is damaged or was replaced$"):
        download(url, "000000")
    assert contents(cache) == []
    cache_path(url).write_bytes(b"something else")
    with pytest.raises(ValueError, match=rf"damaged or was replaced; remove {cache_path(url)}"):
        download(url, MD5[:6])


def test_offline_downloads_nothing_and_says_what_belongs_where(server, cache, monkeypatch):
    url = f"{server.url}/offline.pth"
    monkeypatch.setitem(CATALOGUE, "mine", CatalogueEntry("mae", "vit_base_patch16", url, MD5))
    server.requests.clear()
    for name in ("mine", url):
        with pytest.raises(ValueError, match=f"{url} is not in the cache: fetch it elsewhere and put it at /") as error:
            fetch_weights(name, offline=True)
    assert not server.requests and not cache.exists()
    target = Path(str(error.value).split(" put it at ")[1])
    target.parent.mkdir(parents=True)
    target.write_bytes(DATA)
    assert fetch_weights("mine", offline=True) == target


def test_two_downloads_at_once_leave_one_whole_file(server, cache):
    url, paths = f"{server.url}/slow.pth", []
    threads = [threading.Thread(target=lambda: paths.append(download(url, MD5))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache_path(url)] * 2 and contents(cache) == [DATA]


def test_a_file_url_is_a_download_too_and_needs_no_network(cache, tmp_path):
    (tmp_path / "w.pth").write_bytes(DATA)
    assert download((tmp_path / "w.pth").as_uri(), MD5, offline=True).read_bytes() == DATA


def test_offline_reaches_files_and_timm(cache):
    parser = Parser("")
    add_groups(parser, {"encoder": {"include": "encoder"}})
    build = functools.partial(lambda *argv: build_encoder(parser.parse_args([*argv, "--offline"])))
    with pytest.raises(ValueError, match=r"--offline, and https://dl\.fbaipublicfiles\.com/mae/"):
        build("--finetune", "mae_vit_base_patch16")

    with pytest.raises(ValueError, match=r"--offline, and timm/vit_base_patch16_224.mae is neither"):
        build("--finetune", "vit_base_patch16_224.mae")


def test_the_cache_follows_torch_home(cache):
    assert cache_path("https://x/y.pth").parent == cache == Path(torch.hub.get_dir()) / "checkpoints"
