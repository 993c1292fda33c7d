import html
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from headway.train.report import _smooth, write_report

VOID = {"meta", "link", "br", "input", "img"}


def training(step, **changes):
    record = {
        "step": step,
        "loss": 2.0 + 6.0 * math.exp(-step / 30),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 4096 * step,
        "tokens_per_second": 5200.0,
        "seconds": 0.8 * step,
        "memory_mb": 812.3,
    }
    return {**record, **changes}


def run(folder, metrics=(), tail="", samples=(), config=None, environment=None):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics) + tail)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if config is not None:
        (folder / "config.toml").write_text(config)
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    page = write_report(folder).read_text(encoding="utf-8")
    check_form(page)
    return page


def check_form(page):
    """Every element is closed, in order, and every id is used once."""
    open_elements, ids = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            ids.extend(value for name, value in attributes if name == "id")
            if tag not in VOID:
                open_elements.append(tag)

        def handle_endtag(self, tag):
            assert open_elements.pop() == tag

    Reader().feed(page)
    assert not open_elements
    assert len(ids) == len(set(ids))


def facts(page):
    """The figures at the top of the page by name."""
    return {name: html.unescape(value) for name, value in re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page)}


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_facts_of_a_run(tmp_path):
    metrics = [training(step, loss=3.0) for step in range(1, 101)] + [{"step": 100, "validation_loss": 2.0}]
    page = run(tmp_path, metrics, environment={"parameters": 5_242_880, "device": "cpu", "headway": "0.1.0"})
    assert facts(page) == {
        "training loss": "3.000",
        "validation loss": "2.000",
        "steps": "100",
        "tokens": "410k",
        "wall time": "1 min 20 s",
        "tokens/s": "5200",
        "peak memory": "812 MB",
        "parameters": "5.24M",
    }
    assert "perplexity 7.4, step 100" in page
    assert f"<h1>{tmp_path.name}</h1>" in page


def test_plots_of_a_run(tmp_path):
    metrics = [training(step) for step in range(1, 61)] + [{"step": 60, "validation_loss": 2.9}]
    page = run(tmp_path, metrics)
    captions = re.findall(r"<h3>([^<]+)</h3>", page)
    assert captions == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
    loss = page[page.index('<div class="wide">') : page.index('<div class="narrow">')]
    assert re.findall(r'data-curve="([^"]*)"', loss) == ["every step", "training", "validation"]


def test_page_needs_no_network(tmp_path):
    page = run(tmp_path, [training(step) for step in range(1, 4)])
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script[^>]+src|@import|<link[^>]+stylesheet", page)


def test_page_is_the_same_every_time(tmp_path):
    metrics = [training(step) for step in range(1, 40)]
    assert run(tmp_path, metrics) == run(tmp_path, metrics)


def test_folder_without_any_file_is_a_page(tmp_path):
    page = write_report(tmp_path).read_text()
    check_form(page)
    assert "No step has been recorded yet." in page
    assert "<h2>" not in page


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="run_dir must be a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("steps", [1, 2, 29, 30])
def test_short_runs_are_drawn(tmp_path, steps):
    page = run(tmp_path, [training(step) for step in range(1, steps + 1)])
    assert facts(page)["steps"] == str(steps)
    assert "no data" not in page


def test_validation_before_any_training_step_is_shown(tmp_path):
    page = run(tmp_path, [{"step": 0, "validation_loss": 8.5}])
    assert facts(page) == {"validation loss": "8.500"}
    assert 'data-curve="validation"' in page


def test_best_validation_loss_is_named_where_it_is_not_the_last(tmp_path):
    page = run(tmp_path, [{"step": 10, "validation_loss": 2.0}, {"step": 20, "validation_loss": 2.5}])
    assert "step 20; best 2.000" in page


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "loss": "\udcff', "12", "{"])
def test_torn_last_line_is_ignored(tmp_path, tail):
    whole = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}]
    expected = run(tmp_path, whole)
    (tmp_path / "metrics.jsonl").write_bytes(
        "".join(json.dumps(record) + "\n" for record in whole).encode() + tail.encode("utf-8", "surrogateescape")
    )
    assert write_report(tmp_path).read_text() == expected


def test_unreadable_line_inside_is_left_out_and_counted(tmp_path):
    lines = '{"step": 1, "loss": 9.0}\n{"step": 2, "lo{"step": 2, "loss": 8.0}\n{"step": 3, "loss": 7.0}\n'
    page = run(tmp_path, tail=lines)
    assert facts(page)["steps"] == "3"
    assert "1 unreadable line of metrics.jsonl left out." in page


def test_torn_environment_is_left_out_and_named(tmp_path):
    (tmp_path / "environment.json").write_text('{"python": ')
    assert "environment.json could not be read." in write_report(tmp_path).read_text()


def test_resumed_steps_replace_the_lost_ones(tmp_path):
    first = [{"step": step, "loss": 9.0, "tokens": 4096 * step, "seconds": 0.8 * step} for step in range(1, 21)]
    again = [{"step": step, "loss": 1.0, "tokens": 4096 * step, "seconds": 0.8 * step} for step in range(11, 16)]
    page = run(tmp_path, [*first, {"step": 10, "event": "resumed", "text": "resumed from step 10"}, *again])
    shown = facts(page)
    assert shown["steps"] == "15"
    assert shown["tokens"] == "61 440"
    assert shown["wall time"] == "12 s"
    assert shown["training loss"] == "1.000"


def test_non_finite_numbers_are_left_out_of_the_figures(tmp_path):
    metrics = [training(step, loss=2.0) for step in range(1, 10)]
    metrics += [training(10, loss=math.nan, grad_norm=math.inf, tokens_per_second=math.nan)]
    page = run(tmp_path, metrics)
    assert "NaN" in (tmp_path / "metrics.jsonl").read_text()
    assert facts(page)["steps"] == "10"
    assert "median 5200 tokens/s" in page
    assert not re.search(r"\b(nan|inf)\b", page, re.I)


def test_run_that_is_not_finite_at_all_is_a_page(tmp_path):
    page = run(tmp_path, [training(1, loss=math.nan, grad_norm=math.nan), {"step": 1, "validation_loss": math.inf}])
    assert facts(page)["training loss"] == "not finite"
    assert "perplexity not finite" in page
    assert "<h3>Loss</h3>" not in page


def test_events_are_listed_in_order_and_marked(tmp_path):
    metrics = [{"step": step, "loss": 2.0} for step in range(1, 40)]
    metrics += [
        {"step": 30, "event": "checkpoint_corrupted", "text": "step-30 differs"},
        {"step": 20, "event": "resumed", "text": "resumed from step 20"},
    ]
    page = run(tmp_path, metrics)
    listed = re.findall(r'<li( class="trouble")?>.*?<b>([^<]+)</b><span>([^<]+)</span>', page)
    assert listed == [
        (' class="trouble"', "checkpoint corrupted", "step-30 differs"),
        ("", "resumed", "resumed from step 20"),
    ]
    assert "dotted lines: events" in page


def test_event_without_text_is_listed(tmp_path):
    assert "<b>resumed</b>" in run(tmp_path, [{"step": 3, "event": "resumed"}])


def test_samples_keep_their_white_space_and_mark_the_prompt(tmp_path):
    sample = {"step": 5, "prompt": "\ndef ", "text": "f(x):\n\treturn x  + 1\n"}
    page = run(tmp_path, samples=[sample])
    assert "<pre><mark>\ndef </mark>f(x):\n\treturn x  + 1\n</pre>" in page


def test_latest_samples_come_first_and_only_some_are_kept(tmp_path):
    page = run(tmp_path, samples=[{"step": step, "prompt": "p", "text": f"text {step}"} for step in range(1, 101)])
    assert page.index("text 100") < page.index("<details>") < page.index("text 99")
    assert "text 61" in page
    assert "text 60" not in page
    assert "60 more in samples.jsonl." in page


def test_everything_from_a_run_is_escaped(tmp_path):
    evil = "</pre><script>alert('1')</script>&amp;"
    folder = tmp_path / "a & <b>"
    folder.mkdir()
    page = run(
        folder,
        [training(1), {"step": 1, "event": evil, "text": evil}],
        samples=[{"step": evil, "prompt": evil, "text": evil}],
        config=f"[{evil}]\nkey = '{evil}' # {evil}\n# {evil}\n{evil}\n",
        environment={evil: evil, "device": evil, "parameters": evil, "headway": evil},
    )
    assert page.count("<script>") == 1
    assert "<h1>a &amp; &lt;b&gt;</h1>" in page


def test_configuration_is_shown_as_it_is(tmp_path):
    config = (
        '# resolved\n[optimizer]\nname = "frugal"\nbetas = [\n  0.9,\n  0.999,\n]\n\n[[data.parts]]\npath = "a=b"\n'
    )
    page = run(tmp_path, config=config)
    shown = re.search(r'<pre class="config card">(.*?)</pre>', page, re.S)[1]
    assert text_of(shown) == config
    assert '<span class="section">[optimizer]</span>' in shown
    assert '<span class="comment"># resolved</span>' in shown


def test_environment_is_a_table(tmp_path):
    page = run(tmp_path, environment={"cpu": "i5 @ 1.6 GHz", "threads": 4, "compiled": False, "parameters": 5_242_880})
    rows = re.findall(r'<th scope="row">([^<]+)</th><td>([^<]+)</td>', page)
    assert rows == [("cpu", "i5 @ 1.6 GHz"), ("threads", "4"), ("compiled", "no"), ("parameters", "5 242 880")]


def test_long_runs_are_drawn_with_few_points_and_keep_their_spike(tmp_path):
    metrics = [training(step, loss=3.0, grad_norm=9.0 if step == 7_777 else 1.0) for step in range(1, 12_001)]
    page = run(tmp_path, metrics)
    paths = re.findall(r'data-curve="[^"]*">\s*<path d="([^"]+)"', page)
    assert len(paths) == 10
    assert max(len(re.findall("[ML]", path)) for path in paths) <= 2000
    norm = page[page.index("<h3>Gradient norm</h3>") : page.index("<h3>Throughput</h3>")]
    raw = re.search(r'data-curve="every step">\s*<path d="([^"]+)"', norm)[1]
    heights = [float(pair[1]) for pair in re.findall(r"[ML] (\S+) (\S+)", raw)]
    assert sum(height < np.median(heights) - 20 for height in heights) == 1


def test_old_report_stays_when_writing_fails(tmp_path, monkeypatch):
    report = write_report(tmp_path)
    before = report.read_text()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(training(1)))

    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert report.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_smoothing_starts_at_the_first_value_and_ignores_gaps():
    values = np.r_[8.0, np.linspace(7.0, 3.0, 99)]
    smooth = _smooth(values)
    assert smooth[0] == 8.0
    assert np.ptp(np.diff(smooth)[5:-5]) == pytest.approx(0, abs=1e-9)
    with_gap = values.copy()
    with_gap[50] = math.nan
    assert np.isfinite(_smooth(with_gap)).all()
    np.testing.assert_allclose(_smooth(np.full(70, 2.0)), 2.0)
