"""The Pareto front of a sweep: the rows on it, its page, and its pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrc.report.front import Front, Point, front_figures, smaller_is_better, unbeaten
from lrc.report.page import sweep_page

PPL, ACC = "wikitext2-token-ppl@2048", "arc_easy-acc@0-shot"


def front(**changes) -> Front:
    rows = {
        "original": (538, 12.9, 0.50, 360), "svd-0.4": (367, 60.2, 0.30, 340), "gptq": (174, 13.4, 0.48, 150),
        "rtn": (174, 14.9, 0.45, 150), "trellis-3": (140, 14.6, 0.47, 90), "narrow": (300, 20.0, 0.41, 410),
    }  # fmt: skip
    points = [Point(n, mb * 10**6, {PPL: p, ACC: a}, {PPL: s}) for n, (mb, p, a, s) in rows.items()]
    return Front(**({"sweep": "out", "model": "M", "lrc": "1", "points": points} | changes))


def test_the_front_holds_what_nothing_beats():
    sizes, speeds, accuracy = front_figures(front())
    drawn = {name: {t["name"]: t["text"] for t in json.loads(f.spec)["data"]} for name, f in
             (("sizes", sizes), ("speeds", speeds), ("accuracy", accuracy))}  # fmt: skip
    assert drawn["sizes"]["front"] == ["trellis-3", "gptq", "original"]
    assert drawn["speeds"]["front"] == ["narrow", "original"], "faster is better"
    assert drawn["accuracy"]["front"] == ["trellis-3", "gptq", "original"], "of an accuracy more is better"
    assert set(drawn["sizes"]["others"]) == {"svd-0.4", "rtn", "narrow"}
    assert smaller_is_better(PPL) and not smaller_is_better(ACC)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # slow where others use the processor
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_every_row_is_on_the_front_or_beaten_by_a_row_on_it(values):
    best = unbeaten(values)
    for name, (cost, loss) in values.items():
        beaten = any(v != (cost, loss) and v[0] <= cost and v[1] <= loss for v in (values[b] for b in best))
        assert (name in best) != beaten
    assert [values[name][0] for name in best] == sorted(values[name][0] for name in best)


def test_rows_without_a_speed_have_no_figure_of_speed():
    points = [Point(p.name, p.nbytes, p.metrics) for p in front().points]
    assert [figure.title for figure in front_figures(front(points=points))] == [f"Size and {PPL}", f"Size and {ACC}"]


def test_the_page_holds_every_row_and_needs_no_network():
    page = sweep_page(front(model="<script>alert(1)</script>"))
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert all(name in own for name in ("trellis-3", "svd-0.4", PPL, "538.0 MB"))
    assert "http://" not in own and "https://" not in own and "src=" not in own and "default-src 'none'" in own
    assert "<script>alert" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (Debian: apt-get install chromium)")
def test_a_browser_draws_every_figure(tmp_path):
    probe = """<script>addEventListener("load", () => { document.title = [[...document.querySelectorAll(".figure")].every(
        box => box.querySelector(".scatterlayer .trace")), document.querySelectorAll(".figure").length,
        document.documentElement.scrollWidth <= innerWidth].join() })</script></body>"""
    (tmp_path / "probe.html").write_text(sweep_page(front()).replace("</body>", probe))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,900", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path / 'probe.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>true,3,true</title>" in done.stdout, re.findall("<title>.*?</title>", done.stdout)


def test_pictures_are_drawn_of_the_same_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `pictures`)")
    from lrc.report.picture import draw

    for figure in front_figures(front()):
        draw(figure, tmp_path / f"{figure.name}.png")
        assert (tmp_path / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
