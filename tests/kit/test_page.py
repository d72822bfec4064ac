"""kit/page.py: what the page holds is what was sampled; and a browser plays it, turns it and marks 4:1."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, chromium
from PIL import Image

from kit import pictures, puppet
from kit.attention import holds
from kit.page import PageSample, write_page

PROMPT = 'a person says "</script><script>fail()</script>" & waves'


def puppet_sample(name: str, seed: int = 0) -> PageSample:
    clip = puppet.clips([seed])
    video = pictures.to_frames(puppet.render(clip.joints, clip.betas, clip.shirt)[0][0]).numpy()
    attention = torch.rand((6, 17, 5), generator=torch.Generator().manual_seed(seed)).softmax(-1)
    return PageSample(name, "text to video", PROMPT, video, clip.joints[0].numpy(), 16, attention)


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
    write_page(tmp_path / "index.html", samples, total=30)
    page = data(tmp_path / "index.html")
    assert [found["name"] for found in page["samples"]] == ["joint", "m2v", "v2m"] and page["total"] == 30
    for found, sample in zip(page["samples"], samples, strict=True):
        assert (found["prompt"], found["task"], found["fps"]) == (PROMPT, sample.task, 16)
        np.testing.assert_array_equal(decoded(found["video"], 17), sample.video)
        np.testing.assert_allclose(np.array(found["joints"]) / 1000, sample.joints, atol=6e-4)
        np.testing.assert_allclose(np.array(found["attention"]) / 1000, sample.attention, atol=6e-4)
    assert page["parents"] == puppet.body().parents.tolist()


def test_nothing_comes_from_elsewhere(tmp_path):
    write_page(tmp_path / "index.html", [puppet_sample("joint")], total=1)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in page and not re.search(r"\b(src|href)=|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page  # the browser is told so, too


def test_a_wan_is_shrunk_and_still_to_be_seen(tmp_path):
    y, x = np.mgrid[:480, :832]
    grain = np.random.default_rng(0).normal(0, 8, (480, 832, 3))  # as much as film has
    scene = 128 + 60 * np.sin(x / 40 + np.cos(y / 30))[..., None] * (1, 0.5, 0.2) + grain
    scene = scene.clip(0, 255).astype(np.uint8)
    video = np.stack([np.roll(scene, 3 * i, axis=1) for i in range(9)])
    write_page(tmp_path / "index.html", [puppet_sample("joint")._replace(video=video)], total=1)
    found = data(tmp_path / "index.html")["samples"][0]["video"]
    assert (found["height"], found["width"]) == (256, 444)
    for frame, picture in zip(decoded(found, 9), video, strict=True):
        expected = np.asarray(Image.fromarray(picture).resize((444, 256)), dtype=float)
        assert np.abs(frame - expected).mean() < 8
    assert len(found["sheet"]) < 9 * 40_000


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
    write_page(path, [puppet_sample("joint"), alone, puppet_sample("v2m", 2)._replace(video=None)], total=4)
    return path


STATE = """(() => {
  const article = document.querySelector("article");
  const picture = name => article.querySelector(name).toDataURL();
  return { frame: article.querySelector("input").value, playing: article.classList.contains("playing"),
           video: picture(".video"), skeleton: picture(".skeleton"),
           heading: article.querySelector("h3").textContent };
})()"""


def test_the_slider_steps_and_the_button_plays(browser, index):
    browser.open(index, "#frame=8")
    before = browser.run(STATE)
    assert (before["frame"], before["playing"]) == ("8", False)
    browser.run("document.querySelector('input').focus()")
    browser.press("ArrowRight")
    after = browser.run(STATE)
    assert after["frame"] == "9" and after["heading"] == "Where motion frame 9 looks"
    assert after["video"] != before["video"] and after["skeleton"] != before["skeleton"]
    browser.press("ArrowLeft")
    assert browser.run(STATE) == before
    browser.run("document.querySelector('button').click()")
    assert browser.run(STATE)["playing"]
    browser.run("new Promise(later => setTimeout(later, 300))")
    browser.run("document.querySelector('button').click()")
    paused = browser.run(STATE)
    assert not paused["playing"] and paused["frame"] != "8"
    assert not browser.errors


CORNER = "(({x, y}) => [x + 40, y + 40])(document.querySelector('.skeleton').getBoundingClientRect())"


def test_the_mouse_turns_the_skeleton_and_nothing_else(browser, index):
    browser.open(index, "#frame=3")
    before = browser.run(STATE)
    browser.drag(*browser.run(CORNER), by=60)
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
    browser.drag(*browser.run(CORNER), by=314)  # half a turn
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
    browser.run("document.querySelector('input').focus()")
    for f, own in enumerate(holds(17).tolist()):
        found = browser.run(marks)
        assert found["own"] == own
        assert found["clock"] == pytest.approx(f / 4, abs=0.02)
        assert found["holder"] == pytest.approx(own.index(True), abs=0.02)
        percent = [float(re.search(r": ([\d.]+)%", title)[1]) for title in found["titles"]]
        np.testing.assert_allclose(percent, 100 * sample.attention[:, f].flatten(), atol=0.051)
        browser.press("ArrowRight")


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
    assert browser.run("document.getElementById('note').textContent") == "3 of 4 samples are shown."
    assert not browser.errors
