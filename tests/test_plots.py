import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.plots import Panel, downsample, figure, save, short_number, svg, theme

LINE = Panel("Loss", "step", "nats", {"AdamW": ([1, 2, 3], [3.0, 2.0, 1.5]), "Frugal": ([1, 2, 3], [3.0, 1.9, 1.4])})


def drawn(panel):
    """The values that each curve of the panel's plot holds, in the order of its curves."""
    lines = figure([panel]).axes[0].lines
    return [np.asarray(line.get_ydata()) for line in lines]


def tick_labels(panel, axis):
    drawing = figure([panel])
    drawing.draw_without_rendering()
    (low, high), where = (getattr(drawing.axes[0], f"get_{axis}lim")(), getattr(drawing.axes[0], f"{axis}axis"))
    return [tick.label1.get_text() for tick in where.get_major_ticks() if low <= tick.get_loc() <= high]


def test_claims_and_plots_share_one_panel():
    import headway.claims

    assert headway.claims.Panel is Panel


def test_matplotlib_loads_on_the_first_drawing_only():
    code = "import sys, headway.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pyplot_is_never_loaded():
    code = (
        "import sys; from headway.plots import Panel, svg; svg([Panel('', '', '', {'f': ([0], [0])})], 'a');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_curve_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="curve 'a' must have as many x as y, got 2 and 1"):
        Panel("", "", "", {"a": ([1, 2], [1])})


@pytest.mark.parametrize(
    ("styles", "message"), [({"b": "line"}, "must name curves of the panel, got 'b'"), ({"a": "bold"}, "got 'bold'")]
)
def test_unknown_styles_are_refused(styles, message):
    with pytest.raises(ValueError, match=message):
        Panel("", "", "", {"a": ([1], [1])}, styles=styles)


@pytest.mark.parametrize("draw", [figure, lambda panels: svg(panels, "a")])
def test_no_panel_is_refused(draw):
    with pytest.raises(ValueError, match="panels must hold at least one Panel, got none"):
        draw([])


def test_a_plot_per_panel():
    assert [axes.get_title("left") for axes in figure([LINE, LINE, LINE]).axes] == ["Loss"] * 3


def test_users_settings_are_ignored_and_given_back():
    expected = svg([LINE], "a")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert svg([LINE], "a") == expected
        assert dict(matplotlib.rcParams) == before


def test_svg_takes_the_pages_colours():
    drawing = svg([LINE], "a")
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) - {"none"}
    assert colours <= {"currentColor"} | {part for part in colours if part.startswith("var(--plot-")}
    assert {"currentColor", "var(--plot-1, #2460c4)", "var(--plot-2, #d4541c)"} <= colours
    assert "DejaVu" not in drawing


def test_theme_defines_every_colour_of_svg_for_light_and_dark():
    curves = {f"curve {number}": ([0, 1], [number, number]) for number in range(9)}
    used = set(re.findall(r"--plot-\d+", svg([Panel("", "", "", curves)], "a")))
    light, dark = theme().split("prefers-color-scheme: dark")
    assert len(used) == 8
    assert used == set(re.findall(r"--plot-\d+", light)) == set(re.findall(r"--plot-\d+", dark))


def test_svg_is_an_element_without_declarations_styles_or_dates():
    drawing = svg([LINE], "a")
    ElementTree.fromstring(drawing)
    assert drawing.startswith("<svg")
    assert not re.search(r"<\?xml|<!DOCTYPE|<style|<metadata|<dc:|<!--", drawing)


def test_two_svgs_share_no_id_and_refer_only_to_their_own():
    ids = []
    for prefix in ("first", "second"):
        drawing = svg([LINE, LINE], prefix)
        own = re.findall(r'\bid="([^"]+)"', drawing)
        assert len(own) == len(set(own))
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', drawing)) <= set(own)
        ids.append(set(own))
    assert not ids[0] & ids[1]


def test_svg_is_the_same_every_time():
    assert svg([LINE], "a") == svg([LINE], "a")


@pytest.mark.parametrize("prefix", ["", "1st", "a b", 'a"'])
def test_prefix_that_is_no_id_is_refused(prefix):
    with pytest.raises(ValueError, match="prefix must be letters"):
        svg([LINE], prefix)


def test_names_and_label_are_escaped():
    panel = Panel("a < b & $c$", "<x>", "y", {'<script>"': ([1, 2], [1, 2]), "other": ([1, 2], [1, 2])})
    drawing = svg([panel], "a", label='"<b>"')
    root = ElementTree.fromstring(drawing)
    assert root.get("aria-label") == '"<b>"'
    assert "<script>" not in drawing
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a < b & $c$", "<x>", '<script>"'} <= texts


@pytest.mark.parametrize("log", [False, True])
def test_values_can_be_read_back_from_svg(log):
    y = [1.0, 10.0, 1000.0]
    root = ElementTree.fromstring(svg([Panel("", "", "", {"f": ([1, 2, 3], y)}, log_y=log)], "a"))
    group = next(element for element in root.iter() if element.get("data-frame"))
    curve = next(element for element in group.iter() if element.get("data-curve") == "f")
    _, top, _, bottom = map(float, group.get("data-frame").split())
    low, high, kind = group.get("data-y").split()
    pairs = re.findall(r"[ML] (\S+) (\S+)", curve[0].get("d"))
    shares = [(bottom - float(pair[1])) / (bottom - top) for pair in pairs]
    low, high = float(low), float(high)
    read = [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
    assert kind == ("log" if log else "linear")
    assert read == pytest.approx(y, rel=1e-3, abs=0.02)


def test_png_and_svg_files_are_the_same_every_time(tmp_path):
    for name in ("a.png", "a.svg"):
        assert save([LINE], tmp_path / name) == tmp_path / name
        save([LINE], tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "#2460c4" in (tmp_path / "a.svg").read_text()


def test_other_file_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg"):
        save([LINE], tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_values_that_cannot_be_drawn_leave_gaps():
    x, y = [1, 2, 3, 4], [1.0, math.inf, -2.0, math.nan]
    (linear,) = drawn(Panel("", "", "", {"f": (x, y)}))
    (logarithmic,) = drawn(Panel("", "", "", {"f": (x, y)}, log_y=True))
    np.testing.assert_array_equal(linear, [1.0, np.nan, -2.0, np.nan])
    np.testing.assert_array_equal(logarithmic, [1.0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("y", [[], [math.nan]])
@pytest.mark.parametrize("log", [False, True])
def test_panel_without_a_finite_value_says_no_data(y, log):
    assert ">no data<" in svg([Panel("", "x", "y", {"f": ([1] * len(y), y)}, log_x=log, log_y=log)], "a")


@pytest.mark.parametrize(("x", "y"), [([5], [2.0]), ([0], [0.0]), ([1, 2], [7.0, 7.0]), ([1, 2], [-3.0, -3.0])])
def test_one_point_and_constants_stand_inside_their_axes(x, y):
    axes = figure([Panel("", "", "", {"f": (x, y)})]).axes[0]
    assert axes.get_xlim()[0] < x[0] < axes.get_xlim()[1] or len(x) > 1
    assert axes.get_ylim()[0] < y[0] < axes.get_ylim()[1]
    assert axes.lines[0].get_marker() == "o"


def test_faint_curve_has_the_colour_of_the_curve_after_it():
    curves = {"raw": ([1, 2], [1, 2]), "mean": ([1, 2], [1, 2]), "other": ([1, 2], [1, 2])}
    raw, mean, other = figure([Panel("", "", "", curves, styles={"raw": "faint"})]).axes[0].lines
    assert raw.get_color() == mean.get_color() != other.get_color()


def test_axis_from_zero_starts_at_zero():
    assert figure([Panel("", "", "", {"f": ([1, 2], [810, 830])}, from_zero=True)]).axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("y", "log", "expected"),
    [
        ([0, 1e-3], False, ["0", "2.5e−4", "5e−4", "7.5e−4", "1e−3"]),
        ([0, 40_000], False, ["0", "10k", "20k", "30k", "40k"]),
        ([1e-3, 1.0], True, ["1e−3", "1e−2", "1e−1", "1"]),
        ([1, 2, 4, 8], True, ["1", "2", "4", "8"]),
        ([8, 30], True, ["10", "20", "30"]),
    ],
)
def test_ticks_of_an_axis_are_in_one_form(y, log, expected):
    panel = Panel("", "", "", {"f": (list(range(len(y))), y)}, log_y=log)
    labels = tick_labels(panel, "y")
    assert labels == expected


def test_whole_positions_have_whole_ticks():
    assert tick_labels(Panel("", "", "", {"f": ([1, 2, 3], [1, 2, 3])}), "x") == ["1", "2", "3"]


def test_single_curve_named_like_its_axis_needs_no_legend():
    assert figure([Panel("", "", "loss", {"Loss": ([1], [1])})]).axes[0].get_legend() is None
    assert figure([Panel("", "", "loss", {"AdamW": ([1], [1])})]).axes[0].get_legend() is not None


def test_legend_stays_above_the_axes_and_inside_the_figure():
    curves = {f"a rather long name of a curve {number}": ([0, 1], [0, number]) for number in range(5)}
    drawing = figure([Panel("title", "x", "y", curves)])
    drawing.draw_without_rendering()
    axes = drawing.axes[0]
    legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
    assert axes.get_window_extent().y1 <= legend.y0
    assert legend.y1 <= title.y0
    assert title.y1 <= drawing.bbox.y1
    assert legend.x1 <= drawing.bbox.x1


def test_short_series_is_left_as_it_is():
    assert downsample([1, 2, 3], [1.0, math.nan, 3.0])[0] == [1, 2, 3]


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=300),
    st.integers(4, 50),
)
def test_downsampling_keeps_ends_extremes_order_and_the_limit(y, limit):
    x = list(range(len(y)))
    kept_x, kept_y = downsample(x, y, limit)
    assert len(kept_x) == len(kept_y) <= max(limit, 4)
    assert kept_x == sorted(set(kept_x))
    assert (kept_x[0], kept_x[-1]) == (0, len(y) - 1)
    np.testing.assert_array_equal(kept_y, [y[int(position)] for position in kept_x])
    finite = [value for value in y if math.isfinite(value)]
    if finite:
        kept = [value for value in kept_y if math.isfinite(value)]
        assert (min(kept), max(kept)) == (min(finite), max(finite))


def test_downsampling_refuses_unequal_lengths_and_tiny_limits():
    with pytest.raises(ValueError, match="x and y must have the same length, got 1 and 2"):
        downsample([1], [1, 2])
    with pytest.raises(ValueError, match="limit must be >= 4, got 3"):
        downsample([1], [1], limit=3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-2500.0, "−2500"),
        (2.5e9, "2.5B"),
        (1e20, "1e20"),
        (-1e-5, "−1e−5"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
