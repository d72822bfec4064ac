"""kit/page.py: what the page holds is what was sampled; and a browser plays it, turns it and marks 4:1."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit import page, pictures, puppet
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
    held = data(tmp_path / "index.html")
    assert [found["name"] for found in held["samples"]] == ["joint", "m2v", "v2m"] and held["total"] == 30
    for found, sample in zip(held["samples"], samples, strict=True):
        assert (found["prompt"], found["task"], found["fps"]) == (PROMPT, sample.task, 16)
        np.testing.assert_array_equal(decoded(found["video"], 17), sample.video)
        np.testing.assert_allclose(np.array(found["joints"]) / 1000, sample.joints, atol=6e-4)
        np.testing.assert_allclose(np.array(found["attention"]) / 1000, sample.attention, atol=6e-4)
    assert held["parents"] == puppet.body().parents.tolist()


def test_nothing_comes_from_elsewhere(tmp_path):
    write_page(tmp_path / "index.html", [puppet_sample("joint")], total=1)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in text and not re.search(r"\b(src|href)=|@import|url\(|fetch\(", text)
    assert "default-src 'none'" in text  # the browser is told so, too


def test_a_wan_is_shrunk_and_still_to_be_seen(tmp_path, monkeypatch):
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
    assert len(found["sheet"]) < 9 * 45_000
    monkeypatch.setattr(page, "LIMIT", 100_000)  # as if there were twelve long ones
    write_page(tmp_path / "index.html", [puppet_sample("joint")._replace(video=video)], total=1)
    assert 30_000 < (tmp_path / "index.html").stat().st_size < 100_000


def test_grain_of_a_low_video_does_not_pass_the_limit(tmp_path):
    # which no lossless code makes small
    grain = np.random.default_rng(0).integers(0, 256, (81, 128, 224, 3), dtype=np.uint8)
    write_page(tmp_path / "index.html", [puppet_sample("joint")._replace(video=grain)], total=1)
    assert (tmp_path / "index.html").stat().st_size < page.LIMIT


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
SWITCHES += ["--virtual-time-budget=5000", "--window-size=900,900"]
BEFORE = """<script>
  const errors = [];
  for (const kind of ["error", "securitypolicyviolation"]) addEventListener(kind, () => errors.push(kind));
</script>"""
AFTER = """<script>
  const find = name => document.querySelector(name);
  const [article, slider, button, skeleton] = ["article", "input", "button", ".skeleton"].map(find);
  const picture = name => find(name).toDataURL();
  const show = f => { slider.value = f; slider.oninput(); };
  skeleton.setPointerCapture = () => {};  // knows no pointer that a script made
  skeleton.hasPointerCapture = () => true;
  const drag = by => skeleton.dispatchEvent(new PointerEvent("pointermove", { movementX: by }));
  (async () => {
    await new Promise(later => setTimeout(later, 200));  // pictures are there
    const result = await (async () => { %s })();
    document.body.dataset.result = JSON.stringify({ result, errors });
  })();
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(script, fragment, *options) -> what the script returns on a page of three samples."""
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    alone = puppet_sample("video", 1)._replace(joints=None, attention=None)
    samples = [puppet_sample("joint"), alone, puppet_sample("v2m", 2)]
    write_page(folder / "index.html", samples, total=4)
    written = (folder / "index.html").read_text(encoding="utf-8")

    def run(script: str, fragment: str = "", *options: str) -> dict:
        text = written.replace("<head>", f"<head>{BEFORE}").replace("</body>", f"{AFTER % script}</body>")
        (folder / "test.html").write_text(text, encoding="utf-8")
        call = [CHROMIUM, *SWITCHES, f"--user-data-dir={folder}/profile", *options]
        call.append((folder / "test.html").as_uri() + fragment)
        dom = subprocess.run(call, capture_output=True, text=True, timeout=60).stdout
        found = json.loads(html.unescape(re.search('data-result="([^"]*)"', dom)[1]))
        assert not found["errors"]
        return found["result"]

    return run


def test_the_slider_steps_and_the_button_plays(browser):
    found = browser(
        """
        const state = () => [find("h3").textContent, picture(".video"), picture(".skeleton")];
        const before = state();
        show(9);
        const after = state();
        show(8);
        let tick;
        requestAnimationFrame = call => { tick = call; return 1; };
        button.click();
        tick(performance.now() + 5 / 16 * 1000 + 20);
        return { before, after, frame: slider.value, playing: article.className };
        """,
        "#frame=8",
    )
    assert (found["frame"], found["playing"]) == ("13", "playing")  # sixteen frames a second
    headings = found["before"][0], found["after"][0]
    assert headings == ("Where motion frame 8 looks", "Where motion frame 9 looks")
    assert all(a != b for a, b in zip(found["before"], found["after"], strict=True))


def test_left_is_seen_on_the_right_from_the_front_and_the_other_way_from_behind(browser):
    # catches a mirrored axis: the camera looks along -z, so that what is at larger x is seen further right
    front, behind, by_key, changed = browser(
        """
        const side = () => {
          const { width, height } = skeleton;
          const pixels = skeleton.getContext("2d").getImageData(0, 0, width, height).data;
          const columns = { left: [], right: [] };
          for (let i = 0; i < pixels.length; i += 4) {
            const [red, , blue] = pixels.slice(i, i + 3);
            if (blue > red + 80) columns.left.push(i / 4 % width);
            if (red > blue + 80) columns.right.push(i / 4 % width);
          }
          const mean = values => values.reduce((a, b) => a + b) / values.length;
          return mean(columns.left) - mean(columns.right);
        };
        const [front, video] = [side(), picture(".video")];
        drag(314);  // half a turn
        const behind = side();
        const key = () => skeleton.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
        for (let i = 0; i < 21; i++) key();  // and half a turn back
        return [front, behind, side(), picture(".video") !== video || slider.value !== "0"];
        """,
        "#frame=0",
    )
    joints = puppet_sample("joint").joints[0]
    left, right = joints[[1, 4, 7, 16, 18, 20], 0].mean(), joints[[2, 5, 8, 17, 19, 21], 0].mean()
    assert np.sign(front) == np.sign(left - right) == -np.sign(behind) == np.sign(by_key)
    assert not changed  # mouse and keys turn the skeleton and nothing else


def test_the_map_marks_the_clock_and_the_latent_that_holds_the_frame(browser):
    # catches a second definition of 4:1 that differs from the first, and shares of another frame
    marks = browser(
        """
        const middle = element => (({ left, right }) => (left + right) / 2)(element.getBoundingClientRect());
        const heads = [...article.querySelectorAll(".cells .head")];
        const [first, last] = [middle(heads[0]), middle(heads.at(-1))];
        const place = name => (middle(find(`.cells ${name}`)) - first) / (last - first) * (heads.length - 1);
        return Array.from({ length: 17 }, (_, f) => {
          show(f);
          return { own: heads.map(head => head.classList.contains("own")),
                   clock: place(".clock"), holder: place(".holder"),
                   titles: [...article.querySelectorAll(".cells [title]")].map(cell => cell.title) };
        });
        """,
        "#frame=0",
    )
    attention = puppet_sample("joint").attention
    for f, (own, found) in enumerate(zip(holds(17).tolist(), marks, strict=True)):
        assert found["own"] == own
        assert found["clock"] == pytest.approx(f / 4, abs=0.02)
        assert found["holder"] == pytest.approx(own.index(True), abs=0.02)
        percent = [float(re.search(r": ([\d.]+)%", title)[1]) for title in found["titles"]]
        np.testing.assert_allclose(percent, 100 * attention[:, f].flatten(), atol=0.051)


@pytest.mark.parametrize("dark", (False, True))
def test_it_fits_a_phone_in_light_and_dark(browser, dark):
    script = """
        document.documentElement.style.width = "390px";
        const ends = [...document.body.querySelectorAll("*")].map(x => x.getBoundingClientRect().right);
        const colour = getComputedStyle(document.body).backgroundColor;
        return [Math.max(...ends), colour.match(/\\d+/g).map(Number)];
    """
    end, colour = browser(script, "#frame=16", *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert end <= 390
    assert (max(colour) < 64) if dark else (min(colour) > 192)


def test_what_a_sample_lacks_is_not_shown_and_a_prompt_is_only_text(browser):
    canvases, prompt, note, playing = browser(
        """
        const canvases = article => [...article.querySelectorAll("canvas")].map(canvas => canvas.className);
        return [[...document.querySelectorAll("article")].map(canvases),
                document.querySelector(".prompt").textContent,
                document.getElementById("note").textContent, article.className];
        """
    )
    both = ["video pixels", "skeleton"]
    assert canvases == [both, ["video pixels"], both]
    assert prompt == f"“{PROMPT}”" and note == "3 of 4 samples are shown."
    assert playing == "playing"  # without a frame in the address
