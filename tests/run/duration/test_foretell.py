"""How long a run will take: every part that the run has is in the prediction, and a long run is told what would help."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch
from commandline import lrc_ok, run_lrc
from rich.console import Console

from lrc.commands.common.time_output import print_duration, readable_time
from lrc.compress.linalg import eigh
from lrc.plan.planner import make_draft
from lrc.run.duration.clock import Stopwatch
from lrc.run.duration.eigen_time import Eigenproblems, ReadingTime
from lrc.run.duration.foretell import Duration, foretell
from lrc.run.duration.solve_time import at_full, time_solving
from lrc.run.request import Request


@pytest.fixture(scope="module")
def request_for(tiny_checkpoints, tiny_text_file):
    """A function (recipe, settings) -> the request on a tiny model."""

    def make(recipe: str, family: str = "llama", **settings: object) -> Request:
        calibration = {"source": f"text:{tiny_text_file}", "samples": 8, "length": 48, "held_out": 2}
        return Request.of(tiny_checkpoints(family), recipe, calibration=calibration, **settings)

    return make


def parts_of(request: Request, tmp_path) -> Duration:
    draft = make_draft(request.view(), request.recipe)
    return foretell(request.view(), draft, tmp_path / "out", request.devices)


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("svd-llm", {"ratio": 0.4}, {"forward with statistics"}),
        ("gptq", {"bits": 4}, {"forward with statistics", "forward of the compressed layers"}),
        ("lrc-fast", {"ratio": 0.3}, {"statistics", "losses of the options", "probes"}),
        ("fwsvd", {"ratio": 0.3}, {"gradients"}),
        ("kfac", {"ratio": 0.3}, {"statistics", "gradients"}),
        (
            "kfac",
            {"ratio": 0.3, "propagate": "compressed"},
            {"gradients", "forward with statistics", "forward of the compressed layers"},
        ),
        ("svd-llm", {"max_ppl_increase": 0.05}, {"forward with statistics", "trials of the search"}),
        ("svd", {"ratio": 0.3}, set()),
    ],
)
def test_each_part_of_the_run_is_counted(recipe, settings, expected, request_for, tmp_path):
    found = parts_of(request_for(recipe, **settings), tmp_path)
    whole = {"reading the model once for its hash", "solving", "writing and checking", "perplexity before and after"}
    assert set(found.parts) - whole == expected
    assert all(seconds > 0 for seconds in found.parts.values()) and found.unknown == ()
    assert found.share == 1, "tiny problems are measured as they are"
    assert list(tmp_path.iterdir()) == [], "a probe leaves nothing behind"


def test_what_a_run_leaves_out_is_not_counted(request_for, tmp_path):
    request = request_for("svd", ratio=0.3)
    draft = make_draft(request.view(), request.recipe)
    found = foretell(request.view(), draft, tmp_path / "out", request.devices, checked=False)
    assert "perplexity before and after" not in found.parts


def test_what_cannot_be_foretold_is_named_and_not_in_the_sum(request_for, tmp_path):
    found = parts_of(request_for("block-influence", ratio=0.3), tmp_path)
    assert [reason.partition(" by ")[0] for reason in found.unknown] == ["choosing what to drop"]


def test_training_is_an_upper_bound(request_for, tmp_path):
    request = request_for("svd-llm", ratio=0.3, refine="block")
    found = parts_of(request, tmp_path)
    assert "training of the layers, at most" in found.parts and "training of the layers, at most" in found.rough


def test_experts_are_solved_once_for_all_of_their_shape(request_for, monkeypatch):
    """A layer of four experts has eight units of two shapes beside attention; each is measured once."""
    request = request_for("svd-llm", "mixtral", ratio=0.3)
    draft = make_draft(request.view(), request.recipe)
    solved = []
    monkeypatch.setattr(
        "lrc.run.duration.solve_time.solve_unit", lambda *given: solved.append(given[2].name) or _nothing(given)
    )
    time_solving(draft, Stopwatch(budget=0))
    assert 0 < len(solved) < len(draft.units)


def _nothing(given):
    from lrc.run.solve import solve_unit

    return solve_unit(*given)


def test_a_line_through_two_sizes_meets_the_whole():
    """A constant part does not grow with the work; without one, time grows in proportion."""
    works, whole = (1 / 64, 1 / 8), 10.0
    assert at_full(works, [0.5 + whole * work for work in works]) == pytest.approx(0.5 + whole)
    assert at_full(works, [whole * work for work in works]) == pytest.approx(whole)
    assert at_full([1.0], [3.0]) == 3.0


def test_measuring_stops_where_the_next_size_would_take_too_long():
    ticks = itertools.count()
    taken: list[int] = []
    watch = Stopwatch(clock=lambda: next(ticks) * 0.1, budget=1.0)  # every call seems to take a tenth of a second
    assert len(watch.rising([1, 2, 3], taken.append)) == 3
    taken.clear()
    watch = Stopwatch(clock=lambda: next(ticks) * 0.4, budget=1.0)
    assert len(watch.rising([1, 2, 3], taken.append)) == 1, "four times 0.4 s is more than a second"


def test_a_busy_machine_does_not_end_the_measurement_at_its_shortest_calls():
    """Threads that wait for a core take 0.3 s in every other call, whatever it does; a size takes 0.2 ms a token."""
    now, calls = 0.0, 0

    def run(tokens: int) -> None:
        nonlocal now, calls
        calls += 1
        now += 0.0002 * tokens + (0.3 if calls % 2 else 0.0)

    sizes = [64, 512, 2048]
    found = Stopwatch(clock=lambda: now).rising(sizes, run, sizes)
    assert len(found) == 3
    assert found[-1] == pytest.approx(0.4, abs=0.31)


def test_two_sizes_are_measured_where_the_first_takes_long_and_a_slow_first_call_is_repeated():
    seconds = iter([4.0, 1.5, 3.0])
    now = 0.0

    def run(_: int) -> None:
        nonlocal now
        now += next(seconds)

    assert Stopwatch(clock=lambda: now).rising([64, 512, 2048], run, [64, 512, 2048]) == [1.5, 3.0]


def test_plan_measures_only_where_it_is_asked_to(tiny_checkpoints, tiny_text_file):
    command = ["plan", tiny_checkpoints("llama"), "--recipe", "svd-llm", "--ratio", 0.3,
               "--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 48]  # fmt: skip
    assert "time: not measured (--time" in lrc_ok(*command)
    assert "time: about" in lrc_ok(*command, "--time")
    data = json.loads(run_lrc(*command, "--time", "--json", "-").out)
    assert data["time"]["seconds"] == pytest.approx(sum(data["time"]["parts"].values()))
    assert data["disk"]["peak"] >= data["disk"]["result"] > 0


def test_compress_says_the_time_first_and_not_again_when_it_continues(tiny_checkpoints, tiny_text_file, tmp_path):
    command = ["compress", tiny_checkpoints("llama"), "--recipe", "svd-llm", "--ratio", 0.3, "--no-check", "--samples", 4,
               "--length", 48, "--out", tmp_path / "o", "--calibration", f"text:{tiny_text_file}"]  # fmt: skip
    said = lrc_ok(*command).splitlines()
    time, layer = (next(i for i, line in enumerate(said) if line.startswith(start)) for start in ("time: about", "layer"))
    assert time < layer
    assert "time:" not in lrc_ok(*command)
    assert "time:" not in lrc_ok(*command, "--restart", "--no-time")


def test_a_long_run_is_told_with_what_would_help(request_for):
    request = request_for("svd-llm", ratio=0.3)
    draft = make_draft(request.view(), request.recipe)
    stream = io.StringIO()
    console = Console(file=stream, width=400)
    print_duration(Duration({"forward with statistics": 40_000.0, "solving": 10_000.0}, by_text=36_000.0), draft, console)
    said = stream.getvalue()
    assert "time: about 13.9 h" in said and "solving 2.8 h" in said
    assert "note: this is long" in said and "--samples" in said and "GPU" in said
    assert "note" not in _printed(Duration({"solving": 100.0}), draft)


def _printed(duration, draft) -> str:
    stream = io.StringIO()
    print_duration(duration, draft, Console(file=stream, width=400))
    return stream.getvalue()


def test_times_are_said_in_units_that_a_person_uses():
    said = [readable_time(seconds) for seconds in (0.2, 42, 600, 8 * 3600, 5 * 86400)]
    assert said == ["under 1 s", "42 s", "10 min", "8.0 h", "5.0 days"]


def test_eigenproblems_are_seen_and_what_the_cache_hid_is_added(monkeypatch):
    """Reading a matrix takes a nanosecond a byte in the cache, and three beyond it: 4/3 n³ bytes are read."""
    with Eigenproblems() as seen:
        eigh(torch.eye(32))
        torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
        torch.eye(8) @ torch.eye(8)
    assert seen.widths == [32, 8]
    reading = ReadingTime(Stopwatch())
    assert 0 < reading.seconds_a_byte(300) < 1e-6
    monkeypatch.setattr(reading, "seconds_a_byte", lambda width: 1e-9 if width <= 100 else 3e-9)
    assert reading.beyond_the_cube([100, 100], 0.25) == pytest.approx(2 * 4 / 3 * 400**3 * 2e-9)
    assert reading.beyond_the_cube([400], 1.0) == reading.beyond_the_cube([20], 0.25) == 0.0
