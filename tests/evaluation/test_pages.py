from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, Tagged, Within
from weightpatch.editing import Result
from weightpatch.errors import InvalidInput, MissingExtra, ShapeMismatch
from weightpatch.evaluation import Comparison, Report, Row, comparison_page, edit_page
from weightpatch.evaluation.curve import Curve, Point
from weightpatch.evaluation.metrics import Estimate, Flips
from weightpatch.evaluation.pages._mistakes import find_rows
from weightpatch.evaluation.pages._pictures import Scaled, default_picture, draw, png
from weightpatch.evaluation.pages._plots import drawdown_line, histogram, slack_line
from weightpatch.evaluation.pages._words import Scale, chance, count, decimal, percent, seconds, size
from weightpatch.likelihoods import Bernoulli, Gaussian, Of

VOID = {"meta", "img", "br", "link", "input", "path", "rect", "circle"}


class Page(HTMLParser):
    """Check that tags are balanced, and collect what a reader and a browser meet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def cards(self) -> int:
        return sum(attrs.get("class", "") in ("is-broken", "is-repaired", "is-other") for attrs in self.all("li"))


def check_self_contained(page: Page) -> None:
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        if tag == "img":
            assert attrs["alt"]
            assert (attrs["src"] or "").startswith("data:image/png;base64,")
        if attrs.get("role") == "img":
            assert attrs["aria-label"]
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert "@import" not in page.source and "<!DOCTYPE svg" not in page.source and "<?xml" not in page.source
    assert page.source.count("<style") == 1
    check_references(page)


def check_references(page: Page) -> None:
    """What the page refers to is in the page, once."""
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name.endswith("href")]
    links += re.findall(r"url\((.*?)\)", page.source)
    assert set(links) == {f"#{name}" for name in ids}


@dataclasses.dataclass
class Story:
    """A model, an edit of it, and a test set."""

    model: nn.Module
    constraint: wp.constraints.Constraint | None
    edit: wp.Edit
    test: tuple[Tensor, Tensor]


def story(channels: int = 1, classes: int = 4, lr: float = 1e-2, n: int = 60, **settings: object) -> Story:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 36, classes)).eval()
    inputs = torch.randn(n, channels, 6, 6)
    with torch.no_grad():
        answers = model(inputs).argmax(1)
    constraint = Classified(inputs[:1], (answers[:1] + 1) % classes, 0.1)
    found = wp.edit(model, constraint, wp.editors.RMSProp(**{"lr": lr, "max_steps": 40, **settings}))
    return Story(model, constraint, found, (inputs, answers))


def make(path: Path, told: Story, **settings: object) -> tuple[Page, dict[str, object]]:
    given = {"model": told.model, "edit": told.edit, "constraint": told.constraint, "test": told.test}
    where = edit_page(path / "report.html", **given, **settings)
    assert sorted(p.name for p in path.iterdir()) == ["report.html", "report.json"]
    page = Page(where)
    check_self_contained(page)
    return page, json.loads((path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_edit_with_flips(tmp_path, channels):
    told = story(channels)
    seen = zoo.digest(told.model)
    page, facts = make(tmp_path, told, classes=("cat", "dog", "bird", "fish"))
    assert zoo.digest(told.model) == seen
    assert facts["result"] == "satisfied" and "Patched" in page.text
    flips = facts["comparison"]["flips"]
    assert flips["broken"] > 0
    assert page.cards == min(24, sum(flips.values())) == len(facts["shown"])
    assert facts["mistakes"][0]["met"] and facts["mistakes"][0]["margin_after"] >= 0.1
    assert facts["mistakes"][0]["item"] == 0
    assert facts["patch"]["id"] in page.text and facts["editor"] in page.text
    assert facts["patch"]["manifest"]["base"] in page.text
    assert len(facts["curve"]["points"]) == 11
    assert [
        h for h in ("The mistake", "What else changed", "The trade-off", "Costs", "How it was made") if h in page.text
    ]
    assert len(page.all("img")) == 1 + page.cards
    assert "the edit" in page.text
    figures = [attrs["aria-label"] or "" for attrs in page.all("div") if attrs.get("role") == "img"]
    assert [label.split()[0] for label in figures] == ["Histogram", "Slack", "Drawdown"]
    assert "strength of the patch" in page.text and "change of probability" in page.text


def test_items_are_called_what_the_user_calls_them(tmp_path):
    told = story(1)
    names = [f"cats/{1000 + i}.png" for i in range(len(told.test[1]))]
    page, facts = make(tmp_path, told, items=names, asked=["row 229 of photos"])
    after = copy.deepcopy(told.model)
    told.edit.patch.apply(after)
    assert facts["mistakes"][0]["item"] == "row 229 of photos" and "row 229 of photos" in page.text
    found = wp.compare(told.model, after, told.test)
    assert facts["comparison"]["broken"] == [names[i] for i in found.broken.tolist()]
    assert [card["item"] for card in facts["shown"]] == [names[i] for i in found.flipped.tolist()[:24]]
    shown = [card["item"] for card in facts["shown"] if not card["asked"]]
    assert shown and all(name in page.text for name in shown) and "#" not in page.text.partition("By class")[0]
    for wrong in ({"items": names[1:]}, {"asked": ["a", "b"]}):
        with pytest.raises(InvalidInput, match="names for"):
            make(tmp_path, told, **wrong)


def test_the_page_is_the_same_each_time(tmp_path):
    told = story()
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make(tmp_path / name, told)
        pages.append([(tmp_path / name / file).read_bytes() for file in ("report.html", "report.json")])
    assert pages[0] == pages[1]


def test_names_are_escaped(tmp_path):
    told = story()
    evil = "<script>alert(1)</script>\"'&"
    page, facts = make(tmp_path, told, classes=(evil, evil, evil, evil), tables=[(evil, report())])
    assert "<script" not in page.source
    assert evil in page.text
    assert facts["classes"] == [evil] * 4


def test_no_flips(tmp_path):
    told = story()
    inputs, answers = told.test
    with torch.no_grad():
        sure = told.model(inputs).softmax(1).amax(1)
    rest = (torch.arange(len(inputs)) > 0) & (sure > sure.quantile(0.5))
    told.test = (inputs[rest], answers[rest])
    told.constraint, told.edit = (
        None,
        wp.edit(told.model, Classified(inputs[:1], answers[:1], 0.01), wp.editors.RMSProp(lr=1e-6)),
    )
    page, facts = make(tmp_path, told)
    assert sum(facts["comparison"]["flips"].values()) == 0
    assert "No answer changed" in page.text and page.cards == 0


def test_nothing_to_patch(tmp_path):
    told = story()
    inputs, answers = told.test
    told.constraint, told.edit = (
        None,
        wp.edit(told.model, Classified(inputs[:1], answers[:1]), wp.editors.RMSProp(lr=1e-3)),
    )
    page, facts = make(tmp_path, told)
    assert facts["result"] == "already_satisfied" and facts["curve"] is None
    assert "Nothing to patch" in page.text and "The trade-off" not in page.text


def test_not_patched(tmp_path):
    page, facts = make(tmp_path, story(lr=1e-5, max_steps=1))
    assert facts["result"] == "unsatisfied"
    assert "Not patched" in page.text and "not met" in page.text


def test_no_patch_at_all(tmp_path):
    told = story()
    told.edit = dataclasses.replace(told.edit, result=Result.nonfinite, patch=None, violation=float("nan"))
    page, facts = make(tmp_path, told)
    assert facts["patch"] is None and facts["violation"] is None
    assert "Not patched" in page.text


def test_inputs_that_are_no_pictures(tmp_path):
    case = next(c for c in zoo.CASES if c.name == "encoder")
    model, inputs = case.model().eval(), case.inputs(30)
    with torch.no_grad():
        answers = model(inputs).argmax(1)
    constraint = Classified(inputs[:1], (answers[:1] + 1) % 5)
    found = wp.edit(model, constraint, wp.editors.RMSProp(lr=1e-2, max_steps=30), parameters=case.parameters)
    page, facts = make(tmp_path, Story(model, constraint, found, (inputs, answers)))
    assert not page.all("img")
    assert page.cards == sum(facts["comparison"]["flips"].values()) > 0
    assert "row 0" in page.text


def test_own_pictures(tmp_path):
    told = story()
    page, _ = make(tmp_path, told, picture=lambda item: (item[0] > 0).numpy())
    shown = Image.open(io.BytesIO(base64.b64decode((page.all("img")[0]["src"] or "").partition(",")[2])))
    assert np.array_equal(np.asarray(shown), 255 * (told.test[0][0, 0] > 0).numpy())


def test_many_demands(tmp_path):
    told = story()
    inputs, answers = told.test
    constraint = Classified(inputs[:9], (answers[:9] + 1) % 4) & Kept(inputs[20:23])
    told.constraint = constraint
    told.edit = wp.edit(told.model, constraint, wp.editors.RMSProp(lr=3e-2, max_steps=200))
    page, facts = make(tmp_path, told)
    assert len(facts["mistakes"]) == 6
    assert [(d["kind"], d["asked"]) for d in facts["demands"]] == [("Classified", 9), ("Kept", 3)]
    assert facts["demands"][1]["met_before"] == 3
    assert "The mistakes" in page.text


def test_other_constraints(tmp_path):
    told = story()
    inputs, _ = told.test
    with torch.no_grad():
        target = told.model(inputs[:2]) + 1
    told.constraint, told.edit = (
        None,
        wp.edit(told.model, Within(inputs[:2], target, 0.5), wp.editors.RMSProp(lr=1e-2, max_steps=60)),
    )
    page, facts = make(tmp_path, told)
    assert facts["demands"][0]["kind"] == "Within" and len(facts["mistakes"]) == 2
    assert "Distance" in page.text


def test_mistakes_of_tags_and_of_numbers(tmp_path):
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3).eval(), torch.randn(40, 5)
    with torch.no_grad():
        inputs = inputs[(model(inputs) <= 0).sum(1).argsort(descending=True)]
        before = model(inputs)
    on = [k for k in range(3) if before[0, k] <= 0]
    tagged = Tagged(inputs[:1], on=on, margin=0.1, likelihood=Bernoulli(of=Of.logits))
    target = before[:1] + torch.tensor([[1.0, 0.0, 0.0]])
    cases = (
        (tagged, (before > 0).long(), Bernoulli(of=Of.logits), "Margin in logits"),
        (Within(inputs[:1], target, 0.01), before, Gaussian(), "Distance"),
    )
    for place, (constraint, targets, likelihood, measure) in enumerate(cases):
        (tmp_path / str(place)).mkdir()
        found = wp.edit(model, constraint, wp.editors.RMSProp(lr=1e-2, max_steps=200))
        told = Story(model, constraint, found, (inputs, targets))
        page, facts = make(tmp_path / str(place), told, classes=("hat", "beard", "scarf"), likelihood=likelihood)
        with found.patch.applied(model), torch.no_grad():
            after = model(inputs[:1])[0]
        (mistake,) = facts["mistakes"]
        assert mistake["met"] and mistake["item"] == 0 and measure in page.text
        if place:
            assert mistake["margin_before"] == pytest.approx(1.0)
            assert mistake["margin_after"] == pytest.approx(float((after - target[0]).norm()), abs=1e-5)
            assert mistake["bars"][0]["name"] == "hat" and mistake["bars"][0]["right"] == pytest.approx(
                float(target[0, 0])
            )
        else:
            assert mistake["margin_after"] == pytest.approx(float(after[on].min()), abs=1e-5)
            assert mistake["bars"][0]["after"] == pytest.approx(float(after[on[0]].sigmoid()), abs=1e-5)
            assert mistake["was"] == ", ".join(f"no {('hat', 'beard', 'scarf')[k]}" for k in on)
        assert likelihood.error_name in page.text


def test_demands_on_pixels_are_summed_up(tmp_path):
    torch.manual_seed(0)
    model, inputs = nn.Conv2d(1, 3, 1).eval(), torch.randn(30, 1, 4, 4)
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    wanted = torch.full((1, 4, 4), -100)
    wanted[0, 1, 2] = (targets[0, 1, 2] + 1) % 3
    constraint = Classified(inputs[:1], wanted, 0.1)
    found = wp.edit(model, constraint, wp.editors.RMSProp(lr=1e-2, max_steps=200))
    page, facts = make(tmp_path, Story(model, constraint, found, (inputs, targets)))
    assert facts["mistakes"] == [] and facts["demands"][0]["asked"] == 1
    assert "Positions that changed" in page.text and page.cards > 0


def report() -> Report:
    rows = tuple(Row(i, Result.satisfied, i, -0.1, 0.5, 10**6, None, None) for i in range(3))
    return Report("RMSProp(lr=0.001)", ("fc.*",), "independent", 100, 100, 7.0, rows)


def test_tables(tmp_path):
    page, facts = make(tmp_path, story(), tables=[("Real mistakes", report()), ("Random labels", report())])
    assert "Over many edits" in page.text and "Random labels" in page.text and "base error" in page.text
    assert facts["evaluations"][0]["summary"]["steps"]["value"] == 1


def compared(n: int, classes: int, seed: int = 0) -> tuple[Comparison, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, n, classes, generator=generator)
    inputs = torch.rand(n, 3, 8, 8, generator=generator)
    return Comparison(before, after, torch.randint(classes, (n,), generator=generator)), inputs


def test_thousands_of_flips_and_of_classes(tmp_path):
    comparison, inputs = compared(3000, 200)
    page = Page(comparison_page(tmp_path / "diff.html", comparison, title="v1 → v2", inputs=inputs))
    check_self_contained(page)
    assert page.cards == 24
    assert f"the worst 24 of {comparison.flips.total:,}" in page.text
    assert f"And {comparison.flips.total - 24:,} more" in page.text
    assert "170 classes with fewer flips or none not listed" in page.text
    facts = json.loads((tmp_path / "diff.json").read_text())
    assert facts["comparison"] == json.loads(json.dumps(comparison.to_json()))
    assert len(page.source) < 400_000


def test_a_model_that_answers_nothing(tmp_path):
    comparison, inputs = compared(10, 3)
    broken = Comparison(comparison.before, comparison.after * float("nan"), comparison.targets)
    page = Page(comparison_page(tmp_path / "diff.html", broken, title="a", inputs=inputs))
    assert "no answer" in page.text


def test_the_comparison_page_with_odd_inputs(tmp_path):
    comparison, inputs = compared(40, 3)
    for given_inputs in ((inputs, inputs), {"x": inputs, "flag": True}, inputs.flatten(1), inputs.argsort(1)[:, 0, 0]):
        page = Page(comparison_page(tmp_path / "diff.html", comparison, title="<b>", inputs=given_inputs))
        assert not page.all("img") and "&lt;b&gt;" in page.source
    with pytest.raises(ShapeMismatch, match="40 items"):
        comparison_page(tmp_path / "diff.html", comparison, title="a", inputs=inputs[:3])


def test_bad_paths_and_test_sets_are_refused_before_any_work(tmp_path):
    told = story()
    for path in (tmp_path / "report.json", tmp_path):
        with pytest.raises(InvalidInput, match="HTML"):
            edit_page(path, model=told.model, edit=told.edit, test=told.test)
    told.test = (told.test[0], told.test[1][:3])
    with pytest.raises(ShapeMismatch, match="targets"):
        edit_page(tmp_path / "report.html", model=told.model, edit=told.edit, test=told.test)
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_old_pages_replaced(tmp_path):
    comparison, inputs = compared(40, 3)
    path = tmp_path / "deep" / "er" / "diff.html"
    for _ in range(2):
        assert comparison_page(path, comparison, title="a", inputs=inputs) == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["diff.html", "diff.json"]


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    comparison, inputs = compared(40, 3)
    with pytest.raises(MissingExtra, match=r'pip install "weightpatch\[report\]"'):
        comparison_page(tmp_path / "diff.html", comparison, title="a", inputs=inputs)
    assert not list(tmp_path.iterdir())


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=30), st.integers(0, 29))
def test_rows_are_found(values, chosen):
    test = torch.tensor(values, dtype=torch.float32)
    item = test[chosen % len(test)][None]
    expected = [i for i, row in enumerate(values) if row == item[0].tolist()]
    assert find_rows(test, item) == expected
    assert find_rows({"x": test, "y": test[:, 0]}, {"x": item, "y": item[:, 0]}) == expected
    assert find_rows((test, 3), (item, 3)) == expected
    assert find_rows(test, item.double()) == find_rows(test, item[:, :2]) == find_rows(test, item + 2) == []


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_png_holds_the_pixels(height, width, colour, seed):
    shape = (height, width, 3) if colour else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_a_normalisation_is_undone(mean, std):
    pixels = torch.randint(0, 256, (20, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0, 255
    scaled = Scaled.like((pixels / 255 - mean) / std)
    assert torch.equal((255 * scaled((pixels[3] / 255 - mean) / std)).round().byte(), pixels[3].permute(1, 2, 0))


def test_large_and_constant_pictures():
    large = torch.rand(2, 3, 500, 300)
    assert "base64" in draw(default_picture(large), large, 1).source
    assert not draw(default_picture(large), large, 1).pixelated
    shown = Image.open(io.BytesIO(base64.b64decode(draw(default_picture(large), large, 0).source.partition(",")[2])))
    assert shown.size == (134, 224)
    flat = torch.full((2, 1, 4, 4), 7.0)
    assert draw(default_picture(flat), flat, 0).pixelated
    raw = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    found = Image.open(io.BytesIO(base64.b64decode(draw(default_picture(raw), raw, 0).source.partition(",")[2])))
    assert np.asarray(found).max() == 7
    with pytest.raises(InvalidInput, match="picture returned"):
        draw(lambda item: torch.zeros(2, 2, 2), flat, 0)


def svg(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "svg" and set(root.attrib) == {"viewBox"}
    return root


def words(text: str) -> list[str]:
    return ["".join(t.itertext()) for t in svg(text).iter("text")]


def corners(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def drawn(text: str, colour: str) -> list[list[tuple[float, float]]]:
    """Return the corners of the paths that are filled or drawn in one of the page's colours."""
    paths = [p for p in svg(text).iter("path") if f"var(--{colour})" in p.get("style", "") and p.get("id") is None]
    return [corners(path) for path in paths]


def used(text: str) -> list[tuple[ElementTree.Element, float, float]]:
    """Return the paths that are drawn by reference, and where."""
    root = svg(text)
    paths = {p.get("id"): p for p in root.iter("path")}
    return [(paths[u.get("href", "")[1:]], float(u.get("x", "")), float(u.get("y", ""))) for u in root.iter("use")]


def dots(text: str) -> list[tuple[float, float]]:
    return [(x, y) for path, x, y in used(text) if "C" in path.get("d", "")]


def made_curve(slacks: Sequence[float]) -> Curve:
    last = len(slacks) - 1
    return Curve(
        tuple(Point(i / last, v, Estimate(v / 9, v / 9 - 1, v / 9 + 2), Flips(0, 0, 0)) for i, v in enumerate(slacks))
    )


@pytest.mark.parametrize("slacks", [[-2.0, -0.5, 1.0, 0.5], [-3e3, 4e3], [-1.0, -0.5, -0.25], [0.0, 0.0]])
def test_a_line_goes_through_its_points(slacks):
    curve = made_curve(slacks)
    for text in (slack_line(curve), drawdown_line(curve)):
        places = np.array(dots(text))
        assert len(places) == len(slacks)
        assert np.ptp(np.diff(places[:, 0])) < 1e-3
        if np.ptp(slacks):
            share = (np.array(slacks) - slacks[0]) / (slacks[-1] - slacks[0])
            drop = (places[:, 1] - places[0, 1]) / (places[-1, 1] - places[0, 1])
            assert drop == pytest.approx(share, abs=1e-4)
        assert "0\u2009%" in words(text) and "strength of the patch" in words(text)


def test_a_line_shows_from_where_the_constraint_holds():
    held = slack_line(made_curve([-1.0, -0.5, 0.5]))
    (left, _), _, (right, _) = dots(held)
    line = next(path for path in drawn(held, "good") if len(path) == 2)
    assert [x for x, _ in line] == pytest.approx([left + 0.75 * (right - left)] * 2, abs=1e-3)
    assert "holds" in words(held)
    never = slack_line(made_curve([-1.0, -0.5]))
    assert "holds" not in words(never)
    assert not [path for path in drawn(never, "good") if len(path) == 2]


def test_the_drawdown_has_its_interval():
    text = drawdown_line(made_curve([-0.9, 9.0]))
    (left, low), (right, high) = dots(text)
    unit = (low - high) / 1.1
    (band,) = [[(x + a, y + b) for a, b in corners(path)] for path, x, y in used(text) if "C" not in path.get("d", "")]
    for x, y in ((left, low - 2 * unit), (left, low + unit), (right, high - 2 * unit), (right, high + unit)):
        assert any(x == pytest.approx(a, abs=1e-3) and y == pytest.approx(b, abs=1e-3) for a, b in band)


def test_lines_bear_what_is_not_finite():
    nan, inf = float("nan"), float("inf")
    for slacks in ([-1.0, nan, 1.0], [-inf, 0.5, 1.0], [nan, nan], [-inf, -inf]):
        for text in (slack_line(made_curve(slacks)), drawdown_line(made_curve(slacks))):
            assert len(dots(text)) == np.isfinite(slacks).sum()
            assert "nan" not in text and "inf" not in text


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50))
def test_the_histogram_shows_every_item(values):
    text = histogram(torch.tensor(values, dtype=torch.float64))
    reach = max(*map(abs, values), 1e-6)
    counts, _ = np.histogram(values, 21, (-reach, reach))
    bars = [path for path in drawn(text, "now") + drawn(text, "was") if len(path) == 4]
    tall = [max(y for _, y in bar) - min(y for _, y in bar) for bar in sorted(bars)]
    assert len(tall) == 21
    ranks = [sorted(set(found)).index for found in (counts.tolist(), [round(h, 2) for h in tall])]
    assert [ranks[0](n) for n in counts.tolist()] == [ranks[1](round(h, 2)) for h in tall]
    assert len(drawn(text, "was")) == 2  # the column of what did not move, and the axis


def test_figures_do_not_depend_on_the_settings_of_matplotlib_nor_change_them():
    shift = torch.linspace(-0.3, 0.2, 50)
    curve = made_curve([-1.0, 0.5])
    plain = (slack_line(curve), drawdown_line(curve), histogram(shift))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "lines.marker": "x"}):
        seen = dict(matplotlib.rcParams)
        assert (slack_line(curve), drawdown_line(curve), histogram(shift)) == plain
        assert dict(matplotlib.rcParams) == seen


def test_figures_are_drawn_without_pyplot(tmp_path):
    code = """
import sys, torch, weightpatch.evaluation
assert "matplotlib" not in sys.modules
from weightpatch.evaluation.pages._plots import histogram
print(histogram(torch.linspace(-0.3, 0.2, 50)))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == histogram(torch.linspace(-0.3, 0.2, 50))


def test_figures_follow_the_colours_of_the_page():
    for text in (slack_line(made_curve([-1.0, 0.5])), drawdown_line(made_curve([-1.0, 0.5])), histogram(torch.ones(3))):
        colours = re.findall(r"(?:fill|stroke): ([^;\"]+)", text)
        assert set(colours) <= {"none", *(f"var(--{name})" for name in ("soft", "line", "was", "now", "good"))}
        assert all("font-family: var(--sans)" in t.get("style", "") for t in svg(text).iter("text"))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (count(1234567), "1,234,567"),
        (decimal(-0.001, 2, True), "0.00"),
        (decimal(-1.5), "−1.50"),
        (decimal(float("nan")), "–"),
        (percent(0.0), "0.0\u2009%"),
        (percent(0.0001), "<\u20090.1\u2009%"),
        (percent(0.9999), ">\u200999.9\u2009%"),
        (percent(1.0), "100.0\u2009%"),
        (chance(0.001), "<1"),
        (chance(0.42), "42"),
        (chance(0.999), ">99"),
        (size(999), "999\u2009B"),
        (size(1500), "1.5\u2009kB"),
        (size(228_700), "229\u2009kB"),
        (size(None), "not measured"),
        (seconds(0.0123), "12\u2009ms"),
        (seconds(2.34), "2.3\u2009s"),
        (seconds(600), "10.0\u2009min"),
        (Scale("%").value(7.123), "7.12 %"),
        (Scale("kg").value(0.12345), "0.123 kg"),
        (Scale("").change(-0.001234), "−0.00123"),
        (Scale("kg").change(2.0), "+2"),
        (Scale("%").interval(Estimate(0.0, -0.5, 0.5)), "−0.50 to +0.50"),
        (Scale("%").points, "points"),
    ],
)
def test_words(found, expected):
    assert found == expected
