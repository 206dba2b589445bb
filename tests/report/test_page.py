"""The page: complete in itself, well formed, nothing of a run's text becomes markup, and it takes runs as they come."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlstab_jax.cli import main
from rlstab_jax.report.curves import charts
from rlstab_jax.report.maps import COLUMNS, HeatMap, heat_maps
from rlstab_jax.report.markup import element, escaped
from rlstab_jax.report.page import _check_target, page_of, write_report
from rlstab_jax.report.panels import GRADIENT, LAYER_MAPS, STALENESS_MAP, X
from rlstab_jax.report.pictures import spoken, spoken_maps
from rlstab_jax.report.runs import group_runs, read_runs
from rlstab_jax.report.samples import chosen, samples_table
from rlstab_jax.report.sections import survived
from rlstab_jax.report.timeline import monitor_config
from rlstab_jax.rundir import plain
from rlstab_jax.stability.monitor import LIVE, Check, MonitorConfig
from rlstab_jax.types import UserError
from tests.report.synthetic import sample, write_run

VOID = {"meta", "input", "br", "path", "use", "image", "line"}


class Page(HTMLParser):
    """Checks the nesting of elements while it collects what tests look at."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID - {"path", "use", "image", "line"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two seeds, one unfinished, another replay, a dense model, and a run whose name and samples try to be markup."""
    root = tmp_path_factory.mktemp("study")
    write_run(root / "live-seed0", seed=0, gradient_steps=24)
    write_run(root / "live-seed1", seed=1, steps=4)
    write_run(root / "r3-seed0", learner__replay="r3", layers=3)
    write_run(root / "dense-seed0", layers=0, model="dense", samples=False)
    odd = write_run(root / r"odd<i>$\q$-seed0", steps=1, layers=0, minibatches=1, initial="</style><b>")
    odd.append_samples(2, [sample("<script>alert(1)</script>\x00\ud800\u202e", None, failure="<img src=x>")])
    return root


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> str:
    out, picture = write_report([study], tmp_path_factory.mktemp("out") / "page.html", say=lambda line: None)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return out.read_text("utf-8")


def test_the_page_is_well_formed_and_ids_are_unique(page):
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    inner = [attributes["href"] for _, attributes in parsed.elements if str(attributes.get("href", "")).startswith("#")]
    assert inner
    assert {target[1:] for target in inner} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_the_page_needs_nothing_but_itself(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:image/png")), (tag, value)
    assert not parsed.all("script")
    assert not parsed.all("link")
    assert not re.search(r"@import|url\((?!#)", page)
    (policy,) = [one["content"] for one in parsed.all("meta") if one.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_of_runs_is_only_text(page):
    parsed = Page(page)
    assert not parsed.all("i")
    assert not parsed.all("b")
    assert not parsed.all("img")
    assert "<script>alert(1)</script>␀\ufffd\u202e" in "".join(parsed.text)
    assert "no verdict: <img src=x>" in "".join(parsed.text)
    assert r"odd<i>$\q$" in parsed.text


def test_a_reader_who_sees_no_pictures_is_told(page):
    parsed = Page(page)
    pictures = [one for one in parsed.all("svg") if one.get("aria-hidden") != "true"]
    assert len(pictures) > 15
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in pictures)
    said = next(one["aria-label"] for one in pictures if (one["aria-label"] or "").startswith("Reward and held-out"))
    # Seeds 0 and 1, whose rewards are seed + step / 100, have steps 1 to 4 in common.
    assert "live: 0.51 at step 2, 0.54 at step 8" in (said or "")
    assert "r3: 0.01 at step 2, 0.12 at step 24" in (said or "")
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th"))


def test_a_map_without_a_value_is_told_in_words_too():
    unknown = np.full((2, 3), np.nan)
    unknown[1, 2] = 0.5
    said = spoken_maps(LAYER_MAPS[0], [HeatMap("b4", [0, 1], 0.0, 3.0, unknown)])
    assert said.endswith("means: b4: none in 0, 0.5 in 1.")


def test_what_the_page_says_of_the_runs(page):
    text = re.sub(r"\s+", " ", "".join(Page(page).text))
    assert "5 runs in 4 groups" in text
    assert "0.580 (0.120 to 1.040)" in text  # live, the last tenth: step 12 of seed 0 and step 4 of seed 1
    assert "live-seed1, 8 of 24 steps, last written" in text
    assert "0.250 → 0.250" in text
    assert r"Without routed layers: dense, odd<i>$\q$." in text
    assert "the gradient norm before clipping is 9" not in text  # one excess is not two
    assert "The default ones where a manifest holds none that this version knows: 5 of 5 runs." in text


def test_groups_can_be_hidden_and_told_apart(page):
    parsed = Page(page)
    boxes = [one["id"] for one in parsed.all("input")]
    assert boxes == ["show0", "show1", "show2", "show3"]
    curves = {one["class"] for one in parsed.all("g") if one.get("class")}
    assert curves == {"curve g0", "curve g1", "curve g2", "curve g3"}


def test_a_curve_of_zeros_on_a_logarithmic_axis_is_named():
    x = np.arange(1.0, 4.0)
    (chart,) = charts(GRADIENT, {"a": [{X: x, "learner/grad_norm": x}], "b": [{X: x, "learner/grad_norm": 0 * x}]})
    assert spoken(chart).endswith("a: 1 at step 1, 3 at step 3; b (0 throughout).")
    apart = {"a": [{X: x[:1], "learner/grad_norm": x[:1]}, {X: x[1:], "learner/grad_norm": x[1:]}]}
    assert spoken(charts(GRADIENT, apart)[0]).endswith("norm: 1 at step 1, 1 at step 1.")  # no step in common


def test_one_run_has_its_page_beside_it(tmp_path, capsys):
    write_run(tmp_path / "alone", steps=60, gradient_steps=120)
    (tmp_path / "alone" / "report.png").write_bytes(b"\x89PNG of an earlier version")
    assert main(["report", str(tmp_path / "alone")]) == 0
    assert capsys.readouterr().out == f"done: {tmp_path}/alone/report.html, {tmp_path}/alone/report.png\n"
    text = (tmp_path / "alone" / "report.html").read_text("utf-8")
    assert not Page(text).all("input")
    assert "Light lines: every step" in text
    assert "No field differs." in text
    _check_target(tmp_path / "alone" / "report.html", tmp_path / "alone" / "report.png", read_runs([tmp_path]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone"]


def test_a_run_of_which_there_is_only_the_first_evaluation(tmp_path):
    write_run(tmp_path / "r", steps=0)
    out, _ = write_report([tmp_path / "r"])
    text = "".join(Page(out.read_text("utf-8")).text)
    assert "No run has routed layers" in text
    assert "No responses were logged." in text


def test_equal_runs_give_equal_pictures(study):
    groups = group_runs(read_runs([study / "live-seed0"]))
    first, second = (re.sub(r"Made by .*? UTC", "", page_of("a run", groups, ("seed",))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected the directory of a run: rlstab report runs/quickstart-seed0"),
        (("{run}", "--out", "{dir}"), "is a directory: name the page, such as"),
        (("{run}", "--out", "{dir}/page.pdf"), "expected a name that ends in .html; the picture goes beside it"),
        (("{run}", "--out", "{dir}/mine.html"), "mine.html is there and is no report: give another --out"),
        (
            ("{run}", "--out", "{run}/../r3-seed0/report.html"),
            "r3-seed0/report.png is the picture of a run: give another",
        ),
        (("{run}", "--out", "{dir}/photo.html"), "photo.png is there and is no report: give another --out"),
        (("{dir}/nowhere",), "nowhere: there is no such directory"),
        (("{run}", "--over", "sede"), "--over sede: no run's config has such a field"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, study, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("<html>my notes</html>")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    before = sorted(path.name for path in tmp_path.iterdir())
    filled = [word.format(run=study / "live-seed0", dir=tmp_path) for word in arguments]
    assert main(["report", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("rlstab report: ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (study / "live-seed0" / "report.html").exists()


def test_heat_maps_are_means_over_the_seeds_that_have_come_so_far():
    x = np.array([0.0, 2.0, 4.0, 8.0])
    name = "routing/layer_{:02d}/rollout_vs_old"
    first = {X: x, name.format(0): np.array([np.nan, 1.0, 2.0, 4.0]), name.format(3): np.array([np.nan, 5.0, 6.0, 8.0])}
    second = {X: x[:3], name.format(0): np.array([np.nan, 3.0, np.inf])}
    (one,) = heat_maps(LAYER_MAPS[0], {"a": [first, second], "dense": [{X: x}]})
    assert (one.label, one.rows, one.start, one.end) == ("a", [0, 3], 0.0, 8.0)
    np.testing.assert_array_equal(one.values, [[2, 2, np.nan, 4], [5, 6, np.nan, 8]])  # none at step 6
    assert heat_maps(STALENESS_MAP, {"a": [first]}) == []


def test_long_runs_have_coarser_maps():
    x = np.arange(1.0, 10 * COLUMNS + 1)
    (one,) = heat_maps(LAYER_MAPS[2], {"a": [{X: x, "routing/layer_00/margin": x}]})
    assert one.values.shape == (1, COLUMNS)
    np.testing.assert_allclose(one.values[0, :2], [5.5, 15.5])
    x = x[: COLUMNS * 3 // 2]  # no multiple: columns of one step and of two take turns
    (one,) = heat_maps(LAYER_MAPS[2], {"a": [{X: x, "routing/layer_00/margin": x}]})
    np.testing.assert_allclose(one.values[0], (np.arange(COLUMNS) + 0.5) * 1.5 + 0.5, atol=0.5)


def test_steps_in_which_something_went_wrong_are_counted():
    """Curves leave out what is no finite number."""
    none = np.nan
    metrics = {"reward/mean": np.array([1, 1, 1, none]), "learner/grad_norm": np.array([1, none, 1, none])}
    metrics["learner/broken"] = np.array([0, 0.5, 0.1, none])
    assert survived(metrics) == "; tokens that are no finite number in 2 steps; a gradient that is none in 1 step"
    assert survived({"reward/mean": np.ones(3), "learner/grad_norm": np.ones(3)}) == ""


def test_samples_are_the_best_and_the_worst_of_four_steps():
    samples = [
        {"global_step": step, "response": f"{step}{letter}", "reward": reward}
        for step in range(1, 11)
        for letter, reward in (("a", 0.5), ("b", None if step == 1 else 0.0), ("c", 1.0 if step != 7 else 0.5))
    ]
    samples[18]["reward"] = samples[19]["reward"] = samples[20]["reward"] = 0.5  # step 7: all equal
    assert [one["response"] for one in chosen(samples)] == ["1c", "1b", "4c", "4b", "7a", "10c", "10b"]
    assert chosen([]) == []
    assert "not finite" in samples_table("a run", samples)


def test_long_responses_are_cut_with_their_length_said():
    assert "… 500 more characters" in samples_table("r", [sample("x" * 2000, 1.0, global_step=1)])


def test_text_and_attributes_are_escaped():
    assert element("p", "<&>", title='"') == '<p title="&quot;">&lt;&amp;&gt;</p>'
    assert escaped("a\x1b\tb\x85") == "a␛\tb\ufffd"
    escaped("\ud800").encode()


def test_thresholds_of_a_manifest_are_the_monitors():
    for config in (LIVE, MonitorConfig(gradient=Check(2.0, "skip"), patience=5)):
        assert monitor_config(plain(config)) == config
    assert monitor_config(None) is None
    assert monitor_config({"other": 3}) is None
    assert monitor_config({"gradient": {"factor": 0.5}}) is None


def test_a_page_of_nothing_is_refused():
    with pytest.raises(UserError, match="expected the directory of a run"):
        write_report([])
