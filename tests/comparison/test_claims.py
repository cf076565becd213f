"""Verdicts where the truth was planted."""

from __future__ import annotations

import numpy as np
import pytest

from jaxear.comparison.claims import (
    CLAIMS,
    NOT_TESTABLE,
    REFUTED,
    SUPPORTED,
    Claim,
    Need,
    Runs,
    judge_all,
)
from jaxear.comparison.measurement import MEASURES
from jaxear.comparison.plan import FROZEN, PRETRAINED, SCRATCH, Row
from jaxear.comparison.statistics import Replicates

SAM, RESNET = Row("sam_vit_b", PRETRAINED), Row("resnet50", PRETRAINED)
NEEDS = Need("sam_vit_b"), Need("resnet50")


def planted(value: float, spread: float = 0.1, shift: float = 0.0) -> Replicates:
    """Two seeds `shift` apart, draws that spread around them."""
    values = np.array([value - shift / 2, value + shift / 2])
    draws = values[:, None] + spread * np.random.default_rng(0).standard_normal(2000)
    return Replicates(values, draws)


def judge(claim: Claim, rows: dict[Row, dict[str, Replicates]], **facts) -> dict:
    facts = {"photographs": True, "epochs": 60, "reasons": {}} | facts
    return judge_all(Runs(rows, **facts), [claim])[0]


def rows(sam: Replicates, resnet: Replicates, measure: str = "psnr") -> dict:
    return {SAM: {measure: sam}, RESNET: {measure: resnet}}


@pytest.mark.parametrize(
    ("gain", "bounds", "verdict"),
    [
        (6.0, {"low": 5.0}, SUPPORTED),
        (3.0, {"low": 5.0}, REFUTED),
        (5.01, {"low": 5.0}, NOT_TESTABLE),  # the data do not decide
        (-1.0, {"high": 0.0}, SUPPORTED),
        (1.0, {"high": 0.0}, REFUTED),
        (6.0, {"low": 5.0, "high": 7.0}, SUPPORTED),
        (8.0, {"low": 5.0, "high": 7.0}, REFUTED),
    ],
)
def test_a_difference_is_judged_by_where_its_bounds_lie(gain, bounds, verdict):
    claim = Claim("c", "1", "", "psnr", *NEEDS, **bounds)
    # Draws of the two are paired: what spreads alike cancels.
    sam = planted(25 + gain, 1.0)
    noise = 0.1 * np.random.default_rng(3).standard_normal(sam.draws.shape)
    judged = judge(claim, rows(sam._replace(draws=sam.draws + noise), planted(25.0, 1.0)))
    assert judged["verdict"] == verdict
    assert judged["effect"] == pytest.approx(gain)
    assert judged["effect_low"] < gain < judged["effect_high"]
    assert judged["effect_high"] - judged["effect_low"] < 0.4
    assert bool(judged["reason"]) == (verdict == NOT_TESTABLE)


def test_seeds_that_differ_take_the_certainty_away():
    claim = Claim("c", "1", "", "psnr", *NEEDS, low=0.0)
    assert judge(claim, rows(planted(26.0), planted(25.0)))["verdict"] == SUPPORTED
    unsure = judge(claim, rows(planted(26.0, shift=3.0), planted(25.0, shift=-3.0)))
    assert unsure["verdict"] == NOT_TESTABLE
    assert "the data do not decide" in unsure["reason"]
    one = [Replicates(of.values[:1], of.draws[:1]) for of in (planted(26.0), planted(25.0))]
    unknown = judge(claim, rows(*one))
    assert (unknown["verdict"], unknown["effect"]) == (NOT_TESTABLE, pytest.approx(1.0))
    assert "with one seed" in unknown["reason"]


def test_many_claims_are_corrected_for():
    """A p of 0.03 alone is a finding; as one of four such it is none."""
    sam, resnet = planted(25.0 + 0.1 * 2.17, 0.1), Replicates(*map(np.zeros_like, planted(0.0)))
    resnet = Replicates(resnet.values + 25.0, resnet.draws + 25.0)
    claims = [Claim(f"c{i}", "1", "", "psnr", *NEEDS, low=0.0) for i in range(4)]
    facts = {"reasons": {}, "photographs": True, "epochs": 60}
    alone = judge_all(Runs(rows(sam, resnet), **facts), claims[:1])[0]
    assert alone["p"] == pytest.approx(0.03, abs=0.01)
    assert alone["verdict"] == SUPPORTED
    together = judge_all(Runs(rows(sam, resnet), **facts), claims)
    assert {j["verdict"] for j in together} == {NOT_TESTABLE}
    assert together[0]["p_holm"] == pytest.approx(4 * alone["p"])


def test_ratios_and_facts_of_a_machine():
    ratio = Claim("c", "1", "", "pc1", *NEEDS, kind="ratio", low=2.0)
    judged = judge(ratio, rows(planted(0.3, 0.004), planted(0.1, 0.002), "pc1"))
    assert judged["effect"] == pytest.approx(3.0)
    assert judged["verdict"] == SUPPORTED
    any_start = (Need("sam_vit_b", None), Need("resnet50", None))
    cost = Claim("c", "1", "", "peak_bytes", *any_start, kind="ratio", low=1.5, high=2.5)
    facts = {SAM: 4e9, RESNET: 2e9}
    exact = {row: {"peak_bytes": planted(value, 0.0)} for row, value in facts.items()}
    judged = judge(cost, exact)
    assert (judged["verdict"], judged.get("p")) == (SUPPORTED, None)
    apart = {SAM: {"peak_bytes": planted(4.6e9, 0.0, shift=1e9)}, RESNET: exact[RESNET]}
    assert judge(cost, apart)["reason"] == "the seeds do not agree"


def test_nothing_is_said_of_pretraining_without_pretrained_weights():
    """Rows from scratch have every measure; only claims of architecture and cost may use them."""
    values = {name: planted(2.0 + i, 0.0) for i, name in enumerate(MEASURES)}
    scratch = {
        Row(need.backbone, SCRATCH): values
        for claim in CLAIMS
        for need in (claim.left, claim.right)
        if need is not None
    }
    reasons = {SAM: "weights missing, run `python scripts/port_sam.py --model vit_b`"}
    judged = judge_all(Runs(scratch, reasons, photographs=True, epochs=60))
    by_key = {claim.key: claim for claim in CLAIMS}
    for one in judged:
        claim = by_key[one["key"]]
        wants = [n.weights for n in (claim.left, claim.right) if n is not None]
        if PRETRAINED in wants:
            assert one["verdict"] == NOT_TESTABLE, one["key"]
            assert "effect" not in one
            assert "p" not in one
        else:
            assert "effect" in one, one["key"]
    gain = next(one for one in judged if one["key"] == "sam_psnr_gain")
    assert gain["reason"] == (
        "SAM ViT-B, pretrained: weights missing; ResNet-50, pretrained: not part of this study"
    )


def test_claims_of_a_level_need_photographs_and_the_documents_budget():
    claim = next(claim for claim in CLAIMS if claim.key == "sam_psnr")
    assert claim.text == "SAM ViT-B reaches PSNR of 27 to 32 dB"
    sam = {SAM: {"psnr": planted(29.0)}}
    assert judge(claim, sam)["verdict"] == SUPPORTED
    assert "photographs" in judge(claim, sam, photographs=False)["reason"]
    few = judge(claim, sam, epochs=3)
    assert few["reason"] == "it speaks of 60 epochs of training; here there were 3"
    anatomy = next(claim for claim in CLAIMS if claim.key == "sam_anatomy_pc1")
    assert "synthetic ears alone" in judge(anatomy, sam)["reason"]
    frozen = Row("sam_vit_b", PRETRAINED, FROZEN)
    assert judge(claim, {frozen: {"psnr": planted(29.0)}})["verdict"] == NOT_TESTABLE
