"""kit/page.py: what the page holds is what was sampled; and a browser plays it, turns it and marks 4:1."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, chromium
from PIL import Image

from kit import pictures, puppet
from kit.attention import holds
from kit.page import LIMIT, SHOWN, PageSample, write_page

PROMPT = 'a person says "</script><script>fail()</script>" & waves'


def puppet_sample(name: str, seed: int = 0) -> PageSample:
    clip = puppet.clips([seed])
    video = pictures.to_frames(puppet.render(clip.joints, clip.betas, clip.shirt)[0][0]).numpy()
    joints, attention = clip.joints[0].numpy(), shares(np.random.default_rng(seed), 6, 17)
    return PageSample(name, "text to video", PROMPT, video, joints, 16, attention)


def shares(generator: np.random.Generator, layers: int, f: int) -> np.ndarray:
    mass = generator.random((layers, f, (f - 1) // 4 + 1))
    return mass / mass.sum(axis=-1, keepdims=True)


def wan_sample(name: str) -> PageSample:
    """Of a Wan's size, with as much grain as film has."""
    f, h, w = 81, 480, 832
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    grain = generator.normal(0, 8, (h, w, 3))
    scene = 128 + 60 * np.sin(x / 40 + np.cos(y / 30))[..., None] * (1, 0.5, 0.2) + grain
    scene = scene.clip(0, 255).astype(np.uint8)
    video = np.stack([np.roll(scene, 3 * i, axis=1) for i in range(f)])
    joints = puppet.clips([1], f).joints[0].numpy()
    return PageSample(name, "text to video", "", video, joints, 16, shares(generator, 30, f))


def data(path: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def decoded(video: dict, f: int) -> np.ndarray:
    """The frames of a sheet, cut out as the page's script does."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(video["sheet"].split(",")[1]))))
    h, w, columns = video["height"], video["width"], video["columns"]
    rows = [(i // columns * h, i % columns * w) for i in range(f)]
    return np.stack([sheet[top : top + h, left : left + w] for top, left in rows])


def test_the_page_holds_what_was_sampled(tmp_path):
    samples = [puppet_sample(name, seed) for seed, name in enumerate(("joint", "m2v", "v2m"))]
    write_page(tmp_path / "index.html", samples)
    page = data(tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size < LIMIT / 2
    assert [found["name"] for found in page["samples"]] == ["joint", "m2v", "v2m"]
    for found, sample in zip(page["samples"], samples, strict=True):
        assert (found["prompt"], found["task"], found["fps"]) == (PROMPT, sample.task, 16)
        np.testing.assert_array_equal(decoded(found["video"], 17), sample.video)
        np.testing.assert_allclose(np.array(found["joints"]) / 1000, sample.joints, atol=6e-4)
        np.testing.assert_allclose(np.array(found["attention"]) / 1000, sample.attention, atol=6e-4)
    assert page["parents"] == puppet.body().parents.tolist()


def test_nothing_comes_from_elsewhere(tmp_path):
    write_page(tmp_path / "index.html", [puppet_sample("joint")])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in page and not re.search(r"\b(src|href)=|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page  # the browser is told so, too


def test_a_wan_fits_and_is_still_to_be_seen(tmp_path):
    sample = wan_sample("joint")
    write_page(tmp_path / "index.html", [sample])
    assert (tmp_path / "index.html").stat().st_size < LIMIT
    video = data(tmp_path / "index.html")["samples"][0]["video"]
    assert (video["height"], video["width"]) == (256, 444)
    frames = decoded(video, 81).astype(float)
    for i in (0, 40, 80):
        expected = np.asarray(Image.fromarray(sample.video[i]).resize((444, 256)), dtype=float)
        assert np.abs(frames[i] - expected).mean() < 8


def test_the_first_of_many_are_shown_and_the_page_knows_of_the_others(tmp_path):
    write_page(tmp_path / "index.html", [puppet_sample("joint")] * 30)
    page = data(tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size < LIMIT
    assert (len(page["samples"]), page["total"]) == (SHOWN, 30)


def test_too_large_a_sample_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("kit.page.LIMIT", 150_000)
    write_page(tmp_path / "index.html", [puppet_sample("joint")] * 6)
    page = data(tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size < 150_000
    assert (len(page["samples"]), page["total"]) in {(3, 6), (1, 6)}
    monkeypatch.setattr("kit.page.LIMIT", 30_000)
    write_page(tmp_path / "index.html", [puppet_sample("joint")])
    assert (len(data(tmp_path / "index.html")["samples"]), page["total"]) == (0, 6)


def test_parts_of_different_length_are_refused(tmp_path):
    sample = puppet_sample("joint")
    with pytest.raises(ValueError, match=r"joint has parts of \[13, 17\] frames"):
        write_page(tmp_path / "index.html", [sample._replace(joints=sample.joints[:13])])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    alone = puppet_sample("video", 1)._replace(joints=None, attention=None)
    write_page(path, [puppet_sample("joint"), alone, puppet_sample("v2m", 2)._replace(video=None)])
    return path


STATE = """(() => {
  const article = document.querySelector("article");
  const picture = name => article.querySelector(name).toDataURL();
  return { frame: article.querySelector("input").value, playing: article.classList.contains("playing"),
           video: picture(".video"), skeleton: picture(".skeleton"),
           heading: article.querySelector("h3").textContent };
})()"""


def test_keys_step_and_play_and_arrows_turn_the_skeleton_that_has_the_focus(browser, index):
    browser.open(index, "#frame=8")
    before = browser.run(STATE)
    assert (before["frame"], before["playing"]) == ("8", False)
    browser.press("ArrowRight")
    after = browser.run(STATE)
    assert after["frame"] == "9" and after["heading"] == "Where motion frame 9 looks"
    assert after["video"] != before["video"] and after["skeleton"] != before["skeleton"]
    browser.press("ArrowLeft")
    assert browser.run(STATE) == before

    browser.press(" ")
    playing = browser.run(STATE)
    assert playing["playing"]
    browser.run("new Promise(later => setTimeout(later, 300))")
    browser.press(" ")
    paused = browser.run(STATE)
    assert not paused["playing"] and paused["frame"] != "8"

    browser.open(index, "#frame=8")
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skeleton"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("ArrowRight", "ArrowUp"):
        browser.press(key)
        turned = browser.run(STATE)
        assert turned["frame"] == "8" and turned["video"] == before["video"]
        assert turned["skeleton"] != before["skeleton"]
    browser.press("Home")
    assert browser.run(STATE)["skeleton"] == before["skeleton"]
    for expected, key, frame in (("play", "Tab", "8"), ("", "Tab", "8"), ("", "ArrowRight", "9")):
        browser.press(key)
        assert browser.run("document.activeElement.className") == expected
        assert browser.run(STATE)["frame"] == frame
    assert not browser.errors


def test_the_mouse_turns_the_skeleton_and_nothing_else(browser, index):
    browser.open(index, "#frame=3")
    before = browser.run(STATE)
    place = "(({x, y}) => [x, y])(document.querySelector('.skeleton').getBoundingClientRect())"
    x, y = browser.run(place)
    browser.drag(x + 40, y + 40, by=60)
    after = browser.run(STATE)
    assert after["skeleton"] != before["skeleton"]
    assert {**after, "skeleton": ""} == {**before, "skeleton": ""}
    assert not browser.errors


def test_left_is_seen_on_the_right_from_the_front_and_the_other_way_from_behind(browser, index):
    # catches a mirrored axis: the camera looks along -z, so that what is at larger x is seen further right
    browser.open(index, "#frame=0")
    side = """(() => {
      const canvas = document.querySelector(".skeleton"), { width, height } = canvas;
      const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
      const columns = { left: [], right: [] };
      for (let i = 0; i < pixels.length; i += 4) {
        const [red, , blue] = pixels.slice(i, i + 3);
        if (blue > red + 80) columns.left.push(i / 4 % width);
        if (red > blue + 80) columns.right.push(i / 4 % width);
      }
      const mean = values => values.reduce((a, b) => a + b) / values.length;
      return mean(columns.left) - mean(columns.right);
    })()"""
    joints = puppet_sample("joint").joints[0]
    assert np.sign(browser.run(side)) == np.sign(joints[[1, 4, 7, 16, 18, 20], 0].mean()
                                                 - joints[[2, 5, 8, 17, 19, 21], 0].mean())  # fmt: skip
    front = browser.run(side)
    browser.run("document.querySelector('.skeleton').focus()")
    for _ in range(21):  # steps of 0.15: half a turn
        browser.press("ArrowRight")
    assert np.sign(browser.run(side)) == -np.sign(front)


def test_the_map_marks_the_clock_and_the_latent_that_holds_the_frame(browser, index):
    # catches a second definition of 4:1 that differs from the first, and shares of another frame
    browser.open(index, "#frame=0")
    sample = puppet_sample("joint")
    marks = """(() => {
      const map = document.querySelector(".cells"), middle = x => (x.left + x.right) / 2;
      const box = element => element.getBoundingClientRect();
      const heads = [...map.querySelectorAll(".head")];
      const [first, last] = [heads[0], heads.at(-1)].map(head => middle(box(head)));
      const step = (last - first) / (heads.length - 1);
      const place = name => (middle(box(map.querySelector(name))) - first) / step;
      return { own: heads.map(head => head.classList.contains("own")),
               clock: place(".clock"), holder: place(".holder"),
               titles: [...map.querySelectorAll("[title]")].map(cell => cell.title) };
    })()"""
    for f, own in enumerate(holds(17).tolist()):
        found = browser.run(marks)
        assert found["own"] == own
        assert found["clock"] == pytest.approx(f / 4, abs=0.02)
        assert found["holder"] == pytest.approx(own.index(True), abs=0.02)
        percent = [float(re.search(r": ([\d.]+)%", title)[1]) for title in found["titles"]]
        np.testing.assert_allclose(percent, 100 * sample.attention[:, f].ravel(), atol=0.051)
        browser.press("ArrowRight")
    assert browser.run(STATE)["frame"] == "0"  # from the last frame to the first


@pytest.mark.parametrize("dark", (False, True))
def test_it_fits_a_phone_in_light_and_dark(browser, index, dark):
    browser.open(index, "#frame=16", width=390, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == 390
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(light) < 64) if dark else (min(light) > 192)
    assert not browser.errors


def test_what_a_sample_lacks_is_not_shown_and_a_prompt_is_only_text(browser, index):
    browser.open(index)  # without a frame it plays
    assert browser.run(STATE)["playing"]
    parts = """[...document.querySelectorAll("article")].map(
      article => [...article.querySelectorAll("canvas")].map(canvas => canvas.className))"""
    assert browser.run(parts) == [["video pixels", "skeleton"], ["video pixels"], ["skeleton"]]
    assert browser.run("document.querySelector('.prompt').textContent") == f"“{PROMPT}”"
    assert not browser.errors
