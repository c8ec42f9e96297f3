"""Claims: effects and intervals against scipy's and against hand-made records; the page against the records."""

import math
import sys

import pytest
from scipy import stats

from paper import claims
from paper.claims import CONFIRMED, REFUTED, UNDECIDED, UNTESTED, Encoder, judge
from paper.shown import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import claims as program

RECORDS = ROOT / "results" / "study"
GAIN = {"accuracy": "abmilp", "minus": {"accuracy": "cls"}}


def results(scores: dict[str, list[float]], rates=(1.0,), vary=("weights", "order", "views"), block: int = 5) -> dict:
    """results.json of probes {head: scores of the seeds 0, 1, ...}, whose first rate was chosen; others score 0."""
    probes = {}
    for head, values in scores.items():
        for rate in rates:
            for seed, value in enumerate(values):
                last = {"top1": value if rate == rates[0] else 0.0}
                probes[f"{head}/block{block}/blr{rate}/seed{seed}"] = {
                    "head": head, "block": block, "blr": rate, "seed": seed, "chosen": rate == rates[0],
                    "last": last, "val": {"last": {"top1": value}},
                }  # fmt: skip
    return {"probes": probes, "headline": "top1", "seeds_vary": list(vary)}


def encoder(label: str, kind: str, *files: dict, **entry) -> Encoder:
    return Encoder(label, files, [kind], **entry)


def attention(*means: float) -> dict:
    return {"metrics": {"cls_self_attention": {"blocks": [{"mean": mean} for mean in means]}}}


def by_label(*encoders: Encoder) -> dict[str, Encoder]:
    return {encoder.label: encoder for encoder in encoders}


CLAIM = {"name": "gain", "statement": "s", "source": "s", "measure": GAIN, "of": "masked", "expect": ">",
         "attack": {"of": "photos"}}  # fmt: skip


def masked(label: str, gains: list[float], **options) -> Encoder:
    return encoder(label, "masked", results({"cls": [50.0] * len(gains), "abmilp": [50 + g for g in gains]}, **options))


def test_over_encoders():
    """Of several encoders, the hull of their intervals over runs: the claim holds for each of them."""
    tested = judge(CLAIM, by_label(masked("a", [4.0, 6.0, 5.5]), masked("b", [16.0, 18.0, 17.5])))
    low, high = (stats.ttest_1samp(gains, 0).confidence_interval() for gains in ([4.0, 6.0, 5.5], [16.0, 18.0, 17.5]))
    assert tested.effect.interval == pytest.approx((low[0], high[1]))
    assert tested.effect.value == pytest.approx(11.1667, abs=1e-3)
    assert tested.verdict == CONFIRMED and tested.attack is None


def test_versus_pairs_runs():
    """Runs of two encoders share data order and views, so that their difference is paired."""
    groups = [masked("m", [4.0, 6.0, 5.0]), encoder("j", "joint", *masked("j", [1.0, 3.5, 2.0]).results)]
    effect = claims.effect_of({**CLAIM, "versus": "joint"}, by_label(*groups))
    expected = stats.ttest_1samp([3.0, 2.5, 3.0], 0).confidence_interval()
    assert effect.interval == pytest.approx(tuple(expected)) and effect.value == pytest.approx(8.5 / 3)


def test_over_runs():
    """A single encoder's interval is over its runs, paired by seed; runs that differ in weights alone have none."""
    tested = judge(CLAIM, by_label(masked("a", [4.0, 6.0, 5.5])))
    expected = stats.ttest_1samp([4.0, 6.0, 5.5], 0).confidence_interval()
    assert tested.effect.interval == pytest.approx(tuple(expected)) and tested.effect.over == "runs, in each of 1"
    tested = judge(CLAIM, by_label(masked("a", [4.0, 6.0, 5.5], vary=["weights"])))
    assert math.isnan(tested.effect.interval.low) and tested.verdict == UNDECIDED


def test_versus_and_weight():
    groups = [encoder(f"m{i}", "masked", attention(x), weight=0.0) for i, x in enumerate([0.5, 0.6])]
    groups += [encoder(f"j{i}", "joint", attention(x), weight=1.0) for i, x in enumerate([0.1, 0.2])]
    claim = {**CLAIM, "measure": {"metric": "cls_self_attention"}, "versus": "joint"}
    effect = claims.effect_of(claim, by_label(*groups))
    expected = stats.ttest_ind([0.5, 0.6], [0.1, 0.2]).confidence_interval()
    assert effect.interval == pytest.approx(tuple(expected)) and effect.value == pytest.approx(0.4)
    effect = claims.effect_of(claim, by_label(*groups[:3]))  # a single encoder adds nothing to the pooled variance
    half = stats.t.ppf(0.975, 1) * 0.05 * 2**0.5 * (1 + 1 / 2) ** 0.5
    assert effect.interval == pytest.approx((0.45 - half, 0.45 + half))
    every = [encoder(e.label, "study", *e.results, weight=e.weight) for e in groups]
    effect = claims.effect_of({**claim, "of": "study", "compare": "weight"}, by_label(*every))
    assert effect.value == pytest.approx(-0.4)  # two weights: the slope is the difference, with the pooled deviation
    assert effect.interval == pytest.approx((-expected[1], -expected[0]))
    itself = {**claim, "of": "study", "with": claim["measure"]}  # its slope over itself; too few encoders give none
    assert claims.effect_of(itself, by_label(*every)).interval == pytest.approx((1.0, 1.0))
    unmeasured = encoder("k", "study", results({"cls": [1.0]}), weight=1.0)
    assert len(claims.effect_of(itself, by_label(*every, unmeasured)).each) == 4
    with pytest.raises(claims.Missing, match="4 encoders"):
        claims.effect_of(itself, by_label(*every[:3]))


def test_origin_and_blocks():
    pairs = [encoder("a", "origin", attention(0.1, 0.5)), encoder("b", "origin", attention(0.2, 0.6))]
    pairs += [
        encoder("a2", "masked", attention(0.1, 0.3), origin="a"),
        encoder("b2", "masked", attention(0.2, 0.5), origin="b"),
    ]
    claim = {**CLAIM, "measure": {"metric": "cls_self_attention", "blocks": [-1]}, "compare": "origin"}
    effect = claims.effect_of(claim, by_label(*pairs))
    assert effect.each == pytest.approx({"a2": -0.2, "b2": -0.1})
    assert effect.interval == pytest.approx(tuple(stats.ttest_1samp([-0.2, -0.1], 0).confidence_interval()))
    slope = claims.measure(pairs[0], {"metric": "cls_self_attention", "trend": True})
    assert slope == pytest.approx([0.4])


@pytest.mark.parametrize(
    "bound, gains, verdict",
    [
        ({"above": 1.0, "expect": "<"}, [0.1, 0.2, -0.1], CONFIRMED),
        ({"above": 1.0, "expect": "<"}, [3.1, 3.2, 2.9], REFUTED),
        ({"above": 1.0, "expect": "<"}, [-3.1, -3.2, -2.9], CONFIRMED),
        ({"margin": 1.0, "expect": "<"}, [0.1, 0.2, -0.1], CONFIRMED),
        ({"margin": 1.0, "expect": "<"}, [-3.1, -3.2, -2.9], REFUTED),
        ({"margin": 1.0, "expect": "<"}, [-3.0, 3.0, 1.0], UNDECIDED),
        ({"expect": "<"}, [3.1, 3.2, 2.9], REFUTED),
        ({"expect": ">"}, [3.0, -3.0, 1.0], UNDECIDED),
    ],
)
def test_verdicts(bound, gains, verdict):
    """No verdict but "undecided" has an interval that includes the bound."""
    tested = judge({**CLAIM, **bound}, by_label(masked("a", gains)))
    assert tested.verdict == verdict
    assert (tested.effect.interval.low <= 0 <= tested.effect.interval.high) == (verdict == UNDECIDED)


def test_attack():
    """An attack with the opposite verdict leaves the claim undecided; one without a verdict changes nothing."""
    main = masked("a", [4.0, 6.0, 5.5])
    against = encoder("p", "photos", *masked("p", [-4.0, -6.0, -5.5]).results)
    weak = encoder("p", "photos", *masked("p", [-4.0, 6.0, 0.0]).results)
    assert judge(CLAIM, by_label(main, against)).verdict == UNDECIDED
    assert judge(CLAIM, by_label(main, weak)).verdict == CONFIRMED
    assert judge({**CLAIM, "needs": "a GPU"}, by_label(main)).verdict == UNTESTED


def test_probes():
    """The rate that held-out images chose, or a given one; of several heads, the best on held-out images."""
    file = results({"cls": [50.0, 52.0], "pos": [51.0, 49.0]}, rates=(3.0, 10.0))
    file["probes"]["pos/block5/blr3.0/seed0"]["val"]["last"]["top1"] = 90.0
    one = encoder("a", "masked", file, results({"cls": [10.0, 12.0]}, block=0) | {"knn": {}})
    assert claims.accuracy(one, "cls") == pytest.approx([50.0, 52.0])
    assert claims.accuracy(one, "cls", rate=10.0) == pytest.approx([0.0, 0.0])
    assert claims.accuracy(one, ["cls", "pos"]) == pytest.approx([51.0, 49.0])
    with pytest.raises(claims.Missing, match="abmilp"):
        claims.accuracy(one, "abmilp")


def test_weights():
    rules = [{"name": f"abmilp/seed{s}", "head": "abmilp", "block": 5, "entropy": {"mean": 1.0 + s}} for s in (0, 1)]
    rules += [{"name": "dino", "head": "dino", "block": 5, "entropy": {"mean": 3.0}}]
    maps = {rule["name"]: {"maxboxaccv2": 10.0 * i} for i, rule in enumerate(rules)}
    kl = [[0.0, 9.0, 1.0], [9.0, 0.0, 2.0], [3.0, 5.0, 0.0]]
    one = encoder("a", "masked", {"rules": rules, "localization": {"maps": maps}, "matrices": {"kl": {"mean": kl}}})
    assert claims.entropy(one, "abmilp") == pytest.approx([1.0, 2.0])
    assert claims.localization(one, "dino") == pytest.approx([20.0])
    assert claims.divergence(one, ["abmilp", "dino"]) == pytest.approx([1.0, 2.0])
    assert claims.divergence(one, ["dino", "abmilp"]) == pytest.approx([4.0])


def test_depth():
    """reached: the first block with 90 % of the best accuracy, as a share of the depth."""
    file = {"probes": {}, "headline": "top1", "seeds_vary": ["weights", "order"]}
    for block, scores in enumerate([[10.0, 10.0], [50.0, 20.0], [52.0, 40.0]]):
        file["probes"] |= results({"pos": scores}, block=block)["probes"]
    assert claims.reached(encoder("a", "masked", file), "pos") == pytest.approx([0.5, 1.0])


def test_other_images():
    """shape_bias from conflicting cues; kept: perturbed over plain accuracy of the same file, run by run."""
    scores = [{"cls/block5/blr3.0/seed0": {"top-1": x}, "cls/block5/blr3.0/seed1": {"top-1": 2 * x}} for x in (40, 20)]
    agree = {"run": "runs/cues", "probes": scores[0], "perturbed": {"shuffle:4": scores[1]}}
    conflict = {"run": "runs/cues", "probes": {"cls/block5/blr3.0/seed0": {"top-1": 5.0, "shape bias": 20.0}}}
    one = encoder("a", "masked", results({"cls": [50.0]}), conflict, agree)
    assert claims.kept(one, "cls", "shuffle:4") == pytest.approx([1 / 3, 3 / 7])  # above chance
    assert claims.shape_bias(one, "cls") == pytest.approx([20.0])
    with pytest.raises(claims.Missing, match="shuffle:8"):
        claims.kept(one, "cls", "shuffle:8")


def test_page():
    """docs/claims.md is what the committed records give, and keeps its promises."""
    encoders = claims.read_encoders(RECORDS)
    tests = [judge(claim, encoders) for claim in claims.CLAIMS]
    tested = [test for test in tests if test.verdict != UNTESTED]
    for test in tested:
        if test.verdict != UNDECIDED:
            assert not test.effect.interval.low <= 0 <= test.effect.interval.high, test.claim["name"]
    names = [test.claim["name"] for test in tests]
    assert len(set(names)) == len(names) >= 24 and len(tested) >= 18
    program.keep_table(ROOT / "docs" / "claims.md", "claims", program.COMMAND, program.markdown(encoders), write=False)


def test_refused(tmp_path):
    for content, message in ((None, "cannot be read"), ("a = 1", "is not a list of encoders"), ("[a]", "records")):
        if content:
            (tmp_path / "encoders.toml").write_text(content)
        with pytest.raises(ValueError, match=rf"encoders.toml .*{message}"):
            claims.read_encoders(tmp_path)
    (tmp_path / "encoders.toml").write_text('[a]\nkinds = ["masked"]\nrecords = ["*.json"]\n')
    with pytest.raises(ValueError, match="study_measure"):
        claims.read_encoders(tmp_path)
