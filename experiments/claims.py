"""The claims of the paper (arXiv 2512.01374) and of later work, and our own leads, each as a contrast of cells with a
rule that turns it into a verdict.

Written before any run of the cells they compare, or dated in PROTOCOL.md, which says why. All contrasts are paired:
same cold start, prompts and keys.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from experiments import statistics
from experiments.pairing import Runs, common
from experiments.setting import HIGHER_RATE, RATES
from experiments.study import Run

SMALLEST = 0.03  # smallest effect of interest, in accuracy
ENOUGH = 10  # pairs, for a verdict
EVERY = 10**6  # pairs that are planned where no verdict is: all that there are
NOT_YET, REPRODUCED, UNDECIDED, REFUTED = "not yet run", "reproduced", "not reproduced in this range", "refuted here"

Kind = Literal["higher", "equivalent", "collapses", "best", "trend", "amplifies"]
RULES: dict[Kind, str] = {
    "higher": "mean difference A - B. Reproduced: at least the smallest effect, and adjusted p < 0.05; refuted: the "
    "95% interval is below the smallest effect",
    "equivalent": "mean difference A - B. Reproduced: the 90% interval lies within +- the smallest effect, and the "
    "adjusted p of two one-sided tests is below 0.05; refuted: the 95% interval lies beyond it, in either direction",
    "collapses": "runs of A that collapse. Reproduced: at least half of them, more than of B with adjusted p < 0.05 "
    "(McNemar, exact); refuted: the upper bound (Clopper-Pearson) of A's share is below a half",
    "best": "A less each of B. Reproduced: each 90% interval is above minus the smallest effect; refuted: one of B is "
    "better, its 95% interval beyond the smallest effect, and p < 0.05 (Bonferroni over B)",
    "trend": "slope of A - B over log2 N. Verdicts as of a mean difference",
    "amplifies": "log2 of KL (k3) with live routes over KL with the sampler's routes replayed, in the runs of A. "
    "Verdicts as of a mean difference",
}


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One claim as a comparison of cells of one study."""

    claim: str
    """Its letter in section 6, the name of the work in section 7, or a word of our own."""
    says: str
    study: str
    kind: Kind
    a: tuple[str, ...]
    b: tuple[str, ...] = ()
    endpoint: Literal["final", "peak", "speed"] = "final"
    levels: tuple[float, ...] = ()
    """Of a trend: log2 N of each cell."""
    smallest: float = SMALLEST
    primary: bool = True
    planned: int = ENOUGH
    """Pairs that are judged, the first ones; a verdict after fewer is one so far. Were those judged that other studies
    happen to bring, their number could depend on what has been seen."""
    first_pair: int = 0
    """Of those that count: what the pairs before have suggested is judged on others."""


def _n(number: int, clip: bool, mode: str) -> str:
    return f"n{number}-{'clip' if clip else 'noclip'}-{mode}"


def _at_rate(contrast: Contrast, rate: float, study: str) -> Contrast:
    """The same at a higher learning rate: no cell without clipping collapses at the common one."""
    a, b = (tuple(f"{name}-lr{rate:g}" for name in names) for names in (contrast.a, contrast.b))
    says = f"{contrast.says}, at a rate of {rate:g}"
    return dataclasses.replace(contrast, says=says, study=study, a=a, b=b, primary=False)


def _at_higher_rate(contrast: Contrast) -> Contrast:
    return _at_rate(contrast, HIGHER_RATE, contrast.study)


def _r3_over_r2(number: int, claim: str, says: str, sign: int, primary: bool) -> Contrast:
    cells = (_n(number, True, "r3"),), (_n(number, True, "r2"),)
    planned = ENOUGH if number == 4 else 2 * ENOUGH
    order = cells if sign > 0 else cells[::-1]
    return Contrast(claim, says, "off_policy", "higher", *order, primary=primary, planned=planned)


_ON, _OFF = "on_policy", "off_policy"
_STABLE = (_n(8, True, "r3"),)
# What is judged at two learning rates.
_NO_REPLAY = Contrast("e", "clipping without replay collapses, N = 8", _OFF, "collapses", (_n(8, True, "live"),),
                      _STABLE)  # fmt: skip
_NO_CLIP = Contrast("e", "replay (R3) without clipping collapses, N = 8", _OFF, "collapses", (_n(8, False, "r3"),),
                    _STABLE)  # fmt: skip
_NEITHER = Contrast(
    "e", "live routing without clipping collapses, N = 8", _OFF, "collapses", (_n(8, False, "live"),), _STABLE
)
_R2 = Contrast("g", "R2 does not last at N = 8", _OFF, "collapses", (_n(8, True, "r2"),), _STABLE, primary=False)
_PEAKS = Contrast("i", "stabilised off-policy runs (N = 8, R3) peak as on-policy ones", _OFF, "equivalent", _STABLE,
                  (_n(1, True, "live"),), "peak")  # fmt: skip
PAPER = (
    Contrast("a", "on-policy, no ablation of MiniRL with IS ends better by the margin (the claim is that it is the "
             "most stable; equal ones pass, and in 320 updates none collapses)", _ON, "best", ("minirl",),
             ("no_is", "length_norm", "r3", "r3-no_is", "r3-length_norm")),
    Contrast("b", "without IS, on-policy training collapses, within 320 updates", _ON, "collapses", ("no_is",),
             ("minirl",)),
    Contrast("b", "without IS, with R3, on-policy training collapses, within 320 updates", _ON, "collapses",
             ("r3-no_is",), ("r3",), primary=False),
    Contrast("b", "without IS, at 4 bits, on-policy training collapses, within 320 updates", _ON, "collapses",
             ("no_is-4bit",), ("minirl-4bit",), primary=False),
    Contrast("b", "without IS, under a mismatch that training cannot remove (mu mixed), on-policy training collapses, "
             "within 640 updates", _ON, "collapses", ("mixed-no_is",), ("mixed",), primary=False),
    Contrast("b", "with mu mixed, IS is worth accuracy (asked after six pairs had been seen)", _ON, "higher",
             ("mixed",), ("mixed-no_is",), primary=False),
    *(Contrast("b", f"with noise on the sampler's weights that {how}, IS is worth accuracy, within 640 updates", _ON,
               "higher", (name,), (f"{name}-no_is",), primary=False)
      for name, how in
      (("noise", "lasts and makes a large gap"), ("noise_anew", "is drawn anew and makes a large gap"),
       ("small_noise", "lasts and makes a small gap"))),
    Contrast("c", "length normalisation is worse", _ON, "higher", ("minirl",), ("length_norm",)),
    Contrast("c", "the same, where the answers to one prompt differ in length", _ON, "higher", ("minirl-skips",),
             ("length_norm-skips",), primary=False),
    Contrast("c", "with length normalisation, R3 is worse", _ON, "higher", ("length_norm",),
             ("r3-length_norm",), primary=False),
    Contrast("d", "R3 gives nothing on-policy", _ON, "equivalent", ("r3",), ("minirl",)),
    _NO_REPLAY,
    _NO_CLIP,
    *(_at_higher_rate(contrast) for contrast in (_NO_REPLAY, _NO_CLIP, _NEITHER)),
    *(Contrast("e", f"{what}, N = {n}", _OFF, "collapses", (_n(n, *cell),), (_n(n, True, "r3"),), primary=False)
      for n in (2, 4) for what, cell in
      (("clipping without replay", (True, "live")), ("replay (R3) without clipping", (False, "r3")))),
    _r3_over_r2(2, "f", "R2 is better than R3 at N = 2", -1, True),
    _r3_over_r2(8, "g", "R3 is better than R2 at N = 8", 1, True),
    _r3_over_r2(4, "g", "R3 is better than R2 at N = 4", 1, False),
    Contrast("g", "R2's peak is lower than R3's at N = 8 (asked after the runs had been seen)", _OFF, "higher",
             (_n(8, True, "r3"),), (_n(8, True, "r2"),), "peak", primary=False, planned=2 * ENOUGH),
    _R2,
    _at_higher_rate(_R2),
    Contrast("h", "R3 gains on R2 as N grows", _OFF, "trend", tuple(_n(n, True, "r3") for n in (2, 4, 8, 16)),
             tuple(_n(n, True, "r2") for n in (2, 4, 8, 16)), levels=(1.0, 2.0, 3.0, 4.0)),
    Contrast("h", "R3 gains on live routing as N grows", _OFF, "trend",
             (_n(1, True, "r3"), *(_n(n, True, "r3") for n in (2, 4, 8, 16))),
             (_n(1, True, "live"), *(_n(n, True, "live") for n in (2, 4, 8, 16))), levels=(0.0, 1.0, 2.0, 3.0, 4.0),
             primary=False),
    _PEAKS,
    _at_higher_rate(_PEAKS),
    Contrast("j", "off-policy updates (N = 8, R3) converge faster, at equal responses", _OFF, "higher",
             (_n(8, True, "r3"),), (_n(1, True, "live"),), "speed"),
    Contrast("k", "cold starts end alike after 640 updates: the strong and the plain one", "cold_start",
             "equivalent", ("strong",), ("plain",)),
    *(Contrast("k", f"{what} and the plain one, where no policy can exceed .85, after twice as many updates",
               "cold_start", "equivalent", (f"ceiling-{name}",), ("ceiling-plain",), primary=False)
      for name, what in (("strong", "the strong"), ("slips", "one with slips"))),
    Contrast("k", "the noisy and the plain one (it begins near chance, .12, and hardly ever learns)", "cold_start",
             "equivalent", ("noisy",), ("plain",)),
    Contrast("l", "routing amplifies the discrepancy, by half at least", _ON, "amplifies", ("r3",),
             smallest=math.log2(1.5)),
    Contrast("n", "CISPO collapses where MiniRL does not, N = 8", "objectives", "collapses", ("n8-cispo",),
             ("n8-minirl",)),
)  # fmt: skip

# What an earlier look saw at the two highest rates, from one cold start.
_RATES = "high_rates"
_LEVEL, _BREAKS = (f"-lr{rate:g}" for rate in RATES[-2:])
# What replay's benefit comes from: the paper says, a restored first-order approximation.
_CONTROLS = "controls"
CAUSES = (
    Contrast("replay", "R3 is better than live routing, N = 8, clip", _CONTROLS, "higher", ("n8-clip-r3",),
             ("n8-clip-live",), primary=False),
    *(Contrast("replay", f"R3 is better than {what}, N = 8, clip", _CONTROLS, "higher", ("n8-clip-r3",),
               (f"n8-clip-{control}",), primary=False)
      for control, what in
      (("permuted", "replay of another token's routes"),
       ("frozen_routes", "replay of the routes that the cold start chooses"),
       ("frozen_router", "live routing by a frozen router"))),
    Contrast("replay", "with weights as uneven and as many tokens masked, at random, R3 is better than replay of "
             "another token's routes", _CONTROLS, "higher", (_n(8, True, "uneven"),), (_n(8, True, "permuted"),),
             primary=False),
    *(Contrast("replay", f"live routing without clipping collapses, more often than with {what}, N = 8, at "
               f"{RATES[-1]:g}", _RATES, "collapses", (_n(8, False, "live") + _BREAKS,),
               (_n(8, False, control) + _BREAKS,), primary=False)
      for control, what in
      (("frozen_router", "a frozen router"), ("frozen_routes", "replay of the cold start's routes"),
       ("dense", "a dense model"))),
)  # fmt: skip

LATER = (
    Contrast("DPPO", "its recipe (trust region anchored at mu, cap of 20) is better than MiniRL with its cap of 5, "
             "N = 8", "objectives", "higher", ("n8-dppo_tv",), ("n8-minirl",)),
    Contrast("DPPO", "its trust region alone, with a cap of 5 too, is better than MiniRL's, N = 8", "objectives",
             "higher", ("n8-dppo_tv-cap5",), ("n8-minirl",), primary=False),
    Contrast("DPPO", "the anchor alone is better: MiniRL's clip on pi/mu", "objectives", "higher",
             ("n8-anchor_mu",), ("n8-minirl",), primary=False),
    Contrast("DPPO", "MiniRL collapses at N = 8", "objectives", "collapses", ("n8-minirl",), ("n8-dppo_tv",),
             primary=False),
    Contrast("DPPO", "MiniRL collapses at N = 8 on a dense model (asked after the runs had been seen)", _CONTROLS,
             "collapses", ("n8-clip-dense",), ("n1-clip-dense",), primary=False),
    Contrast("R3", "R3 is better than live routing on-policy", _ON, "higher", ("r3",), ("minirl",)),
    Contrast("R3", "R3 makes truncation redundant, N = 8", _OFF, "equivalent", ("n8-clip-r3-nocap",),
             ("n8-clip-r3",)),
    Contrast("IcePop", "its band is better than GRPO alone, N = 8", "objectives", "higher", ("n8-icepop",),
             ("n8-grpo",)),
    Contrast("TIS", "the weight is better than DAPO alone, N = 8", "objectives", "higher", ("n8-tis",), ("n8-dapo",)),
    Contrast("GSPO", "sequence ratios are better than GRPO's, N = 8", "objectives", "higher", ("n8-gspo",),
             ("n8-grpo",)),
    Contrast("RSPO", "its recipe (the router shift, and a wider clip, by token) is better than GSPO, N = 8",
             "objectives", "higher", ("n8-rspo",), ("n8-gspo",)),
    Contrast("RSPO", "RSPO is better than without its router shift, N = 8", "objectives", "higher", ("n8-rspo",),
             ("n8-rspo-no_shift",), primary=False),
    Contrast("TRM", "its mask of sequences is better than MiniRL's clip of tokens, N = 8", "objectives", "higher",
             ("n8-trm",), ("n8-minirl",), primary=False),
    Contrast("MinPRO", "the prefix's smallest ratio in the weight is better than none, N = 8", "objectives", "higher",
             ("n8-minpro",), ("n8-minirl",), primary=False),
    Contrast("KPop", "its mask of tokens beside MiniRL's clip is better than the clip alone, N = 8", "objectives",
             "higher", ("n8-kpop",), ("n8-minirl",), primary=False),
    Contrast("geometric mask", "its mask of sequences beside MiniRL's clip is better than the clip alone, "
             "N = 8", "objectives", "higher", ("n8-geometric",), ("n8-minirl",), primary=False),
    Contrast("PR2", "routes that a predictor foretells are better than R2's, N = 8", _CONTROLS, "higher",
             ("n8-clip-pr2",), ("n8-clip-r2",), primary=False),
    Contrast("FP16", "rollouts in fp16 end better than in bf16, a learner in float32 (their gaps are compared below)",
             "discrepancy", "higher", ("fp16",), ("bf16",)),
    Contrast("FP16", "both engines in fp16 end better than both in bf16, as that work trains", "discrepancy", "higher",
             ("both_fp16",), ("both_bf16",), primary=False),
)  # fmt: skip
LEADS = (
    Contrast("lead", f"without clipping and replay N = 8 collapses at {RATES[-1]:g}, more often than with both", _RATES,
              "collapses", (_n(8, False, "live") + _BREAKS,), (_n(8, True, "r3") + _BREAKS,)),
    Contrast("lead", f"the same, more often than on-policy training at {RATES[-1]:g}", _RATES, "collapses",
             (_n(8, False, "live") + _BREAKS,), (_n(1, True, "live") + _BREAKS,), primary=False),
    *(_at_rate(contrast, RATES[-1], _RATES) for contrast in (_NO_REPLAY, _NO_CLIP)),
    Contrast("lead", f"with clipping and R3 N = 8 is no worse than on-policy training at {RATES[-2]:g}", _RATES, "best",
             (_n(8, True, "r3") + _LEVEL,), (_n(1, True, "live") + _LEVEL,)),
    *(Contrast("lead", f"with clipping and R3 it is better than with {what}, N = 8, at {RATES[-2]:g}", _RATES, "higher",
               (_n(8, True, "r3") + _LEVEL,), (_n(8, *cell) + _LEVEL,), primary=primary)
      for what, cell, primary in
      (("clipping alone", (True, "live"), True), ("neither clipping nor replay", (False, "live"), False),
       ("R2", (True, "r2"), False))),
    *(Contrast("size", f"in the large model {what} (asked after ten pairs had been seen; of others from the same cold "
               "starts)", "scale", "higher", (f"large-{a}",), ("large-n8-clip-live",), first_pair=30)
      for what, a in (("R3 is better than live routing, N = 8, clip", "n8-clip-r3"),
                      ("on-policy updates are better than N = 8, clip, live", "n1-live"))),
    *(Contrast("length", f"with answers of 73 tokens {what}, N = 8 (asked after ten pairs had been seen; of others"
               f"{' from the same cold starts' if first_pair == 30 else ''})", "scale", kind, (f"len73-{a}",),
               (f"len73-{b}",), primary=primary, first_pair=first_pair)
      for what, kind, a, b, primary, first_pair in
      (("clipping is better than none, live", "higher", "n8-clip-live", "n8-noclip-live", True, 30),
       ("live routing without clipping collapses", "collapses", "n8-noclip-live", "n8-clip-live", False, 30),
       ("clipping is better than none, live, once more", "higher", "n8-clip-live", "n8-noclip-live", False, 40),
       ("clipping is better than none, R3", "higher", "n8-clip-r3", "n8-noclip-r3", False, 40),
       ("R3 without clipping collapses", "collapses", "n8-noclip-r3", "n8-clip-r3", False, 40),
       ("R3 is better than live routing, no clipping", "higher", "n8-noclip-r3", "n8-noclip-live", False, 40))),
)  # fmt: skip


def _less(study: str, says: str, a: str, b: str) -> Contrast:
    return Contrast("", says, study, "higher", (a,), (b,), primary=False, planned=EVERY)


# Differences that no claim asks for, or that were not asked beforehand: their figures are shown, without a verdict.
_MINIBATCH, _LAG = "mini-batches of", "staleness"
DESCRIBED = (
    _less(_LAG, "batches 2 updates old less N = 2", "lag2", "n2"),
    _less(_LAG, "batches 8 updates old less N = 8", "lag8", "n8"),
    _less(_LAG, "the same with R3", "lag8-r3", "n8-r3"),
    _less(_LAG, "batches 8 updates old less on-policy", "lag8", "n1"),
    *(_less(_OFF, f"{_MINIBATCH} {size} responses less of 128, {routing}, N = 8", f"n8-clip-{mode}-batch{size}",
            f"n8-clip-{mode}") for size, mode, routing in ((64, "live", "live"), (64, "r3", "R3"), (256, "r3", "R3"))),
    _less(_OFF, "no cap on the weight less a cap of 5, live, N = 8", "n8-clip-live-nocap", "n8-clip-live"),
    _less(_OFF, "a cap of 2 less a cap of 5, live, N = 8", "n8-clip-live-cap2", "n8-clip-live"),
    _less(_OFF, "a cap of 5 on pi_old/mu less one on pi_theta/mu, live, N = 8", "n8-clip-live-capfactor",
          "n8-clip-live"),
    _less(_ON, "without IS less with it, 4-bit rollouts", "no_is-4bit", "minirl-4bit"),
    _less(_ON, "R3 less live routing, 4-bit rollouts", "r3-4bit", "minirl-4bit"),
    *(_less("discrepancy", f"rollouts in {what} less by the engine that trains, N = 1", cell, "equal")
      for what, cell in (("bf16", "bf16"), ("fp16", "fp16"), ("e4m3", "e4m3"), ("e5m2", "e5m2"), ("4 bits", "4bit"),
                         ("e4m3, router exempt,", "e4m3_router_exempt"),
                         ("e4m3, KV cache exempt,", "e4m3_cache_exempt"))),
    _less("discrepancy", "both engines in bf16 less rollouts in bf16, N = 1", "both_bf16", "bf16"),
    _less("discrepancy", "rollouts in e4m3, N = 1: training in bf16 less in float32", "bf16_e4m3", "e4m3"),
    _less("discrepancy", "rollouts in e4m3, N = 1: training in e4m3, too, less in float32", "both_e4m3", "e4m3"),
    _less("discrepancy", "both engines in e4m3 less both in float32, N = 1", "both_e4m3", "equal"),
    _less("discrepancy", "rollouts in float32, N = 1: training in e4m3 less in float32", "train_e4m3", "equal"),
    _less("objectives", "sequence-level IS less MiniRL, N = 8", "n8-sequence_is", "n8-minirl"),
    *(_less("objectives", f"{what} less MiniRL, N = 1", f"n1-{name}", "n1-minirl")
      for what, name in (("DPPO", "dppo_tv"), ("GRPO, GSPO or RSPO", "grpo"), ("CISPO", "cispo"),
                         ("IcePop", "icepop"), ("DAPO", "dapo"), ("TIS", "tis"),
                         ("sequence-level IS", "sequence_is"))),
    _less(_CONTROLS, "a dense model less one with experts, N = 8, clip, live", "n8-clip-dense", "n8-clip-live"),
    _less(_CONTROLS, "a dense model, N = 8 less N = 1", "n8-clip-dense", "n1-clip-dense"),
)  # fmt: skip
# The same at each size and length of the study `scale`, whose name comes before the cells'.
BY_SCALE = (
    _less("scale", "R3 less live routing, N = 8, clip", "n8-clip-r3", "n8-clip-live"),
    _less("scale", "no clipping less clipping, N = 8, live", "n8-noclip-live", "n8-clip-live"),
    _less("scale", "N = 8 less N = 1, clip, live", "n8-clip-live", "n1-live"),
)
ALL = PAPER + CAUSES + LATER + LEADS


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the finished runs say of a contrast."""

    contrast: Contrast
    pairs: int
    """That it rests on."""
    figures: str
    p: float
    """Not adjusted; NaN for rules without one."""
    reproduced: bool
    """But for the adjusted p."""
    refuted: bool

    def text(self, adjusted: float) -> str:
        if self.pairs < ENOUGH:
            return f"{NOT_YET} ({self.pairs} of {ENOUGH} pairs)" if self.pairs else NOT_YET
        planned = self.contrast.planned
        so_far = f", so far ({self.pairs} of {planned} pairs)" if self.pairs < planned else ""
        return self._word(adjusted) + so_far

    def _word(self, adjusted: float) -> str:
        significant = math.isnan(adjusted) or adjusted < 0.05
        if self.reproduced and significant:
            return REPRODUCED
        return REFUTED if self.refuted else UNDECIDED


_UNITS = {"final": "", "peak": " of the peaks", "speed": " of the mean over the horizon"}


def judge(contrast: Contrast, runs: Runs) -> Verdict:
    """Applies the contrast's rule to the first pairs that all of its cells have run, as many as are planned."""
    names = contrast.a + contrast.b
    allowed = {name: [run for run in runs.get(name, ()) if run.pair >= contrast.first_pair] for name in names}
    cells = [done[: contrast.planned] for done in common(allowed, names)]
    a, b = cells[: len(contrast.a)], cells[len(contrast.a) :]
    pairs, smallest = len(a[0]), contrast.smallest
    if pairs == 0:
        return Verdict(contrast, 0, "", math.nan, False, False)
    if contrast.kind == "collapses":
        return _judge_collapses(contrast, a[0], b[0])
    if contrast.kind == "best":
        return _judge_best(contrast, a[0], b)
    if contrast.kind == "amplifies":
        ratio = [run.mean("discrepancy_live/k3") / run.mean("discrepancy/k3") for run in a[0]]
        differences = np.log2(ratio)
    elif contrast.kind == "trend":
        by_level = np.stack([_differences(contrast, x, y) for x, y in zip(a, b, strict=True)], axis=1)
        differences = statistics.slope(by_level, np.array(contrast.levels))
    else:
        differences = _differences(contrast, a[0], b[0])
    if not np.isfinite(differences).all():
        return Verdict(contrast, 0, "not measured in all of its runs", math.nan, False, False)
    found = statistics.estimate(differences, _cold_starts(a[0]))
    unit = {"amplifies": " log2", "trend": " per doubling of N"}.get(contrast.kind, _UNITS[contrast.endpoint])
    figures = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{unit}"
    if contrast.kind == "equivalent":
        beyond = found.low >= smallest or found.high <= -smallest
        figures += f", 90% [{found.low90:+.3f}, {found.high90:+.3f}]"
        return Verdict(contrast, pairs, figures, found.p_beyond(smallest), found.equivalent(smallest), beyond)
    return Verdict(contrast, pairs, figures, found.p, found.mean >= smallest, found.high < smallest)


def _differences(contrast: Contrast, a: Sequence[Run], b: Sequence[Run]) -> np.ndarray:
    return np.array([getattr(x, contrast.endpoint) - getattr(y, contrast.endpoint) for x, y in zip(a, b, strict=True)])


def _cold_starts(runs: Sequence[Run]) -> np.ndarray:
    return np.array([run.cold_start for run in runs])


def _judge_collapses(contrast: Contrast, a: Sequence[Run], b: Sequence[Run]) -> Verdict:
    first, second = (np.array([run.collapsed for run in runs]) for runs in (a, b))
    low, high = statistics.clopper_pearson(int(first.sum()), len(first))
    figures = f"{first.sum()} of {len(first)} [{low:.2f}, {high:.2f}] against {second.sum()}"
    more = first.mean() >= 0.5 and first.sum() > second.sum()
    return Verdict(contrast, len(first), figures, statistics.mcnemar(first, second), bool(more), high < 0.5)


def _judge_best(contrast: Contrast, a: Sequence[Run], others: Sequence[Sequence[Run]]) -> Verdict:
    """An intersection of tests, so that each of them may use its whole level; the refutation is a union."""
    found = [statistics.estimate(_differences(contrast, a, b), _cold_starts(a)) for b in others]
    worst = int(np.argmin([e.low90 for e in found]))
    figures = f"least: {found[worst].mean:+.3f}, 90% from {found[worst].low90:+.3f}, against {contrast.b[worst]}"
    refuted = any(e.high <= -contrast.smallest and e.p * len(found) < 0.05 for e in found)
    reproduced = all(e.low90 > -contrast.smallest for e in found)
    return Verdict(contrast, len(a), figures, math.nan, reproduced, refuted)


def verdicts(contrasts: Sequence[Contrast], runs: Mapping[str, Runs]) -> list[tuple[Verdict, float, str]]:
    """For each contrast its verdict, its p adjusted by Holm, and the verdict in words.

    A family are the primary contrasts of one study that have a p and enough pairs, or the other ones of that study.
    """
    judged = [judge(contrast, runs.get(contrast.study, {})) for contrast in contrasts]
    adjusted = [math.nan] * len(judged)
    for family in {(contrast.study, contrast.primary) for contrast in contrasts}:
        members = [
            i
            for i, verdict in enumerate(judged)
            if (verdict.contrast.study, verdict.contrast.primary) == family
            and verdict.pairs >= ENOUGH
            and math.isfinite(verdict.p)
        ]
        for i, p in zip(members, statistics.holm([judged[i].p for i in members]), strict=True):
            adjusted[i] = p
    return [(verdict, p, verdict.text(p)) for verdict, p in zip(judged, adjusted, strict=True)]
