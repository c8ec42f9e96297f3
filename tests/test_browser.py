"""The report in Chromium: layout, filter, order, downloads, values, maps; no request, no script of its records."""

import csv
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_report import EVIL, aggregation, attention, bank, build, log_of, put, put_picture, put_training

from scripts import leaderboard

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the report with")
WIDTHS, SCHEMES = (390, 800, 1280), ("light", "dark")
HOSTILE = [EVIL, "=cmd|' /C calc'!A0", "<img src=x onerror=alert(2)>", "javascript:alert(3)", "{{ 7 * 7 }}</script>",
           "a" * 300]  # fmt: skip


BROKEN_BADGES = """[...document.querySelectorAll(".badge")].filter(badge => badge.checkVisibility()).map(badge => {
  const words = [...badge.textContent.matchAll(/[a-z]+/g)], range = document.createRange(), text = badge.firstChild;
  return words.filter(word => {
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    return range.getClientRects().length > 1;
  });
}).flat()"""
HIDDEN_COLUMNS = """[...document.querySelectorAll(".table:not(details *) .scroll")]
  .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.textContent.slice(0, 200))"""
FIRST_COLUMN = """(() => {
  const box = [...document.querySelectorAll(".scroll")].find(box => box.scrollWidth > box.clientWidth + 99);
  box.scrollLeft = 99;
  return box.querySelector("tbody th").getBoundingClientRect().left - box.getBoundingClientRect().left;
})()"""
PATCHES = """canvas => [0.375, 0.625].map(
  x => [...canvas.getContext("2d").getImageData(x * canvas.width, canvas.height / 8, 1, 1).data].slice(0, 3))"""


def put_examples(path, label):
    """Two images of 4 x 4 patches: three blocks and two heads of attention, two rules; the first two patches alike."""
    rng, patches = np.random.default_rng(0), np.zeros((2, 16, 8), np.float16)
    patches[:, 0, 0] = patches[:, 1, 0] = 1
    patches[:, 2:] = rng.normal(size=(2, 14, 8))
    tensors = {"pictures": rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8), "patches": patches,
               "attention": rng.random((2, 3, 2, 16)).astype(np.float16),
               "weights": rng.random((2, 2, 16)).astype(np.float16)}  # fmt: skip
    facts = {"grid": [4, 4], "images": [EVIL, "images/two.png"], "rules": [EVIL, "abmilp"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"label": label} | {name: json.dumps(value) for name, value in facts.items()})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Runs of every program, twelve in all, that put hostile text wherever a record may hold text."""
    folder = tmp_path_factory.mktemp("browser")
    for i, text in enumerate(HOSTILE):
        name = f"run{i} {text.replace('/', '|')[:60]}"
        results = bank(heads=("cls", text), held_out=i % 2 == 1, command=text, commit=text, versions={text: text})
        results["args"] |= {"data_path": text, text: text}
        results["knn"] = {f"{text}/seed{seed}": {"20": {"top1": 50.0 + seed, "top5": 90.0}} for seed in (0, 1)}
        put(folder / "probes" / name / "results.json", results)
        put(folder / "probes" / name / "log.txt", log_of(results, epochs=4))
    run = {"reduction": text, "dataset": text, "data_path": text, "label": HOSTILE}
    put(folder / "attention" / "args.json", {"args": run, "encoders": [{"model": text, "source": text}]})
    for i, text in enumerate(HOSTILE):
        metrics = attention(text, source=text)
        metrics["metrics"] |= {text: metrics["metrics"]["cls_patch_entropy"] | {"unit": text, "definition": text}}
        put(folder / "attention" / f"encoder{i}" / "attention.json", metrics)
    put_examples(folder / "attention" / "encoder0" / "examples.safetensors", EVIL)
    rules = aggregation()
    rules["rules"][0] |= {"name": EVIL, "notes": HOSTILE}
    rules["localization"] |= {"boxes": EVIL}
    put(folder / "aggregation" / "aggregation.json", rules)
    put_examples(folder / "aggregation" / "examples.safetensors", EVIL)
    for i, program in enumerate(("finetune", "pretrain", "pretrain", "pretrain")):
        put_training(folder / "trained" / f"{i}{EVIL.replace('/', '|')}", program, data_path=EVIL)
    put_picture(folder / "aggregation" / f"{EVIL.replace('/', '|')}.png", size=(1800, 40))
    began = time.process_time()
    page = build(folder / "report.html", folder)
    assert time.process_time() - began < 60
    assert "12 runs" in page.text and "Left out" not in page.text
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, report):
    """The report, opened once; every request beyond it, error of its script, and dialog is kept."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.faults = []
    opened.on("request", lambda r: opened.faults.append(r.url) if not re.match("file:|data:|blob:", r.url) else None)
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.faults.append(dialog.message), dialog.dismiss()))
    opened.goto(report.as_uri())
    yield opened
    opened.close()


def table(page, heading):
    """The first table with a column of this name that is not folded away."""
    return page.locator(".table", has=page.locator("thead th", has_text=heading)).locator("visible=true").first


def test_nothing_overflows_hides_or_breaks_at_any_width_in_either_scheme(page):
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(BROKEN_BADGES) == []
    assert page.evaluate(HIDDEN_COLUMNS) == []  # at 1280 pixels
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate(FIRST_COLUMN) == pytest.approx(0, abs=1)  # it stays where it is
    page.set_viewport_size({"width": 1280, "height": 900})


def test_text_has_the_contrast_of_wcag_aa_in_both_schemes():
    css = (Path(__file__).parent.parent / "report" / "page.css").read_text()

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for scheme in re.findall(r":root \{(.*?)\}", css, re.S):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        for ground in ("ground", "card", "stripe"):
            assert all(contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "soft", "link"))
            assert all(contrast(colours[f"c{i}"], colours[ground]) >= 3 for i in range(8))
        assert all(contrast(colours[n], colours[f"{n}-ground"]) >= 4.5 for n in ("good", "loud"))


def test_tables_filter_sort_and_unfold(page):
    probes = table(page, "test top-1")
    rows = probes.locator("tbody tr:visible")
    assert rows.count() == 2  # heads; their seeds are folded
    probes.get_by_role("button", name="unfold all").click()
    assert rows.count() == 6
    probes.get_by_role("button", name="fold all").click()
    heading = probes.locator("thead th", has_text="test top-1").get_by_role("button")
    for order in (["41.00 ± 1.41", "51.00 ± 1.41"], ["51.00 ± 1.41", "41.00 ± 1.41"]):
        heading.focus()
        page.keyboard.press("Enter")
        assert [" ".join(row.split("\t")[2].split()) for row in rows.all_inner_texts()] == order
    overview = table(page, "measured on")
    overview.get_by_role("searchbox").fill("pretraining finished")
    assert overview.locator("tbody tr:visible").count() == 3
    assert "3 of 12 rows" in overview.inner_text()
    overview.get_by_role("searchbox").fill("")


def test_tables_download_as_csv_and_json_without_formulas(page):
    probes = page.locator(".table", has=page.locator("thead th", has_text="test top-1"), has_text="=cmd").first
    files = {}
    for form in ("CSV", "JSON"):
        with page.expect_download() as download:
            probes.get_by_role("button", name=form, exact=True).click()
        files[form] = Path(download.value.path()).read_text()
    rows, records = list(csv.DictReader(io.StringIO(files["CSV"]))), json.loads(files["JSON"])
    assert len(rows) == len(records) == 6
    assert float(rows[0]["test top-1 (%)"]) == records[0]["test top-1 (%)"] == 41.0
    assert records[0]["test top-1 (%), std"] == pytest.approx(2**0.5)
    assert records[3]["head"] == HOSTILE[1] and rows[3]["head"] == f"'{HOSTILE[1]}"


def test_plots_show_values_and_hide_lines(page):
    plot = page.locator(".plot", has_text="training loss").locator("visible=true").first
    plot.scroll_into_view_if_needed()
    plot.locator(".axes").hover(position={"x": 2, "y": 50})
    assert "epoch (from 1): 1" in plot.locator(".values").inner_text() and ": 2" in plot.locator(".values").inner_text()
    page.keyboard.press("Escape")
    plot.locator(".axes").focus()
    page.keyboard.press("ArrowRight")
    assert "epoch (from 1): 2" in plot.locator(".values").inner_text()
    line = plot.locator(".line").first
    entry = plot.locator(".legend button").first
    entry.click()
    assert not line.is_visible() and entry.get_attribute("aria-pressed") == "false"
    entry.click()
    assert line.is_visible()


def test_maps_show_heads_blocks_rules_and_similar_patches(page):
    maps = page.locator(".maps").first
    maps.scroll_into_view_if_needed()
    tiles, pick = maps.locator(".tile"), maps.locator("canvas.pick").first
    pick.wait_for()
    assert tiles.count() == 10  # of two runs: picture, components, [cls], two rules
    pick.click(position={"x": 3, "y": 3})
    assert "row 0, column 0" in maps.inner_text()
    alike, other = maps.locator("canvas.pick").first.evaluate(PATCHES)
    assert sum(alike) > sum(other) + 30  # brighter
    maps.locator("canvas.pick").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "row 1, column 1" in maps.inner_text()
    for view, count in (("heads", 2), ("blocks", 3)):
        maps.get_by_label("show").select_option(view)
        page.wait_for_function(f"document.querySelector('.maps').querySelectorAll('.tile').length === {count}")
    tiles.nth(1).click()
    assert maps.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not maps.locator("dialog").is_visible()


def test_hostile_records_run_no_script_and_nothing_is_requested(page, report):
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    page.wait_for_timeout(200)
    assert page.faults == []
    assert page.locator("img[onerror], main script:not([type])").count() == 0
    assert page.evaluate("[...document.querySelectorAll('a')].every(link => link.getAttribute('href').startsWith('#'))")
    assert report.stat().st_size < 5e6


def test_without_its_script_the_page_shows_tables_plots_and_pictures(browser, report):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(report.as_uri())
    assert opened.locator("tr.child:visible").count() >= 24
    assert opened.locator(".plot:visible path.curve").count() > 10 and opened.locator("img:visible").count() > 2
    context.close()


def test_the_leaderboard_fits_every_width_and_filters(browser, tmp_path):
    records, target = Path(__file__).parent.parent / "results", tmp_path / "leaderboard.html"
    leaderboard.main(leaderboard.get_args_parser().parse_args([str(records), "--output", str(target)]))
    page, requests = browser.new_page(), []
    page.on("request", lambda r: requests.append(r.url) if not re.match("file:|data:|blob:", r.url) else None)
    page.goto(target.as_uri())
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    rows = page.locator("tbody tr:visible")
    count = rows.count()
    page.get_by_role("searchbox").first.fill("abmilp")
    assert 0 < rows.count() < count and requests == []
    page.close()
