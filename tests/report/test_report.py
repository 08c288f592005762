"""The pages of runs: whole, half-way, damaged, compared."""

import html
import json
import logging
import re
import shutil
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from made_run import make_run

from lgl_plugin.cli.main import main
from lgl_plugin.report import figures, sections
from lgl_plugin.report.build import write_report
from lgl_plugin.report.comparison import group_by_settings
from lgl_plugin.report.overview import overview
from lgl_plugin.report.page import (
    Command,
    Figure,
    Links,
    Page,
    Recordings,
    Summary,
    Table,
)
from lgl_plugin.report.results import Results

FAILED = "could not be made"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its page."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "1")
    write_report([folder])
    return folder


def read(folder):
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def parts(folder, *names):
    """The page with some of its sections only; the figures take long."""
    page, run = Page(folder / "report", "some"), Results(folder)
    collected = {
        name: page.collect(getattr(sections, name), run) for name in names
    }
    introduction = page.collect(overview, run, page.failures)
    page = page.write(introduction, collected, "")
    return page.read_text(encoding="utf-8")


def change(folder, name, **values):
    """Changes Stage II's settings or what is done, in state.json."""
    state = json.loads((folder / "state.json").read_text())
    part = state["settings"]["stage 2"] if name == "settings" else state[name]
    part.update(values)
    (folder / "state.json").write_text(json.dumps(state))


def test_page_holds_every_figure_and_nothing_from_elsewhere(run):
    text = read(run)
    assert FAILED not in text
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {path.stem for path in (run / "report").glob("*.svg")}
    assert names == {
        "error_rate_by_phase",
        *(f"losses_{n}_{p}" for n in (1, 2) for p in ("classifier", "gated")),
        "reliability",
        "selected",
        "det",
        "cluster_sizes",
        "map_clusters",
        "map_speakers",
        "utterances_per_second",
        "loss",
        "pseudo_eer",
    }
    images = re.findall(r'<img alt="[^"]{20,}"[^>]* src="data:image/', text)
    assert len(images) == len(names)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)


def test_tables_say_what_the_metrics_say(run):
    text = read(run)
    row = r"iteration 2, gated</th>\s*<td>16.0 \(\d+.\d-\d+.\d\)</td>"
    assert re.search(row + "<td>0.533</td>", text)
    assert "<td>2.00</td>" in text  # tau
    assert "100 target and 100 non-target trials" in text


def test_facts_and_descriptions_say_what_the_run_did(run):
    text = html.unescape(read(run))
    assert re.search(r"EER, iteration 2, gated \(95 %\)</dt><dd>16.0 %", text)
    assert "below the 25.0 % of log-mel statistics</dt><dd>9.0 points" in text
    assert "<dt>pseudo-EER %, held out</dt><dd>10.0</dd>" in text
    assert "<dt>steps done</dt><dd>10 of 10</dd>" in text
    assert "true speakers, 6 from 10 to 10" in text
    assert "60 of 60 utterances, the 6 largest clusters" in text
    assert "training loss per epoch: first 4" in text
    assert "<summary>stage 1: 5 settings</summary>" in text


def test_an_error_rate_stands_in_the_facts_and_in_one_table(run):
    text = read(run)
    assert text.count("35.0") == 1
    assert text.count("16.0") == 1 + 2  # of two phases in the table


def test_verdict_and_next_command(run, tmp_path):
    """Healthy; not finished; something is wrong."""
    text = read(run)
    assert 'class="verdict good">Healthy: no check finds' in text
    assert f"lgl export {run}</pre>" in text
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    encoder = folder / "export" / "iter2"
    encoder.mkdir(parents=True)  # all that a failed export leaves
    assert f"lgl export {folder}</pre>" in parts(folder)
    (encoder / "hyperparams.yaml").touch()
    assert f"lgl who {encoder} AUDIO OUT" in parts(folder)
    change(folder, "settings", n_iterations=3)
    start = {"command": "python train_lgl.py mine.yaml", "versions": {}}
    (folder / "starts.jsonl").write_text(json.dumps(start))
    text = parts(folder)
    assert "next step: iter3/embeddings. Healthy" in text
    assert "python train_lgl.py mine.yaml</pre>" in text
    record = {"stage": 2, "iteration": 2, "phase": "gated", "epoch": 2}
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({**record, "mean_cosine": 0.999}))
    text = parts(folder)
    assert "the embeddings have collapsed" in text
    assert "what follows: 1 in all" in text and "Healthy" not in text


def test_intervals_need_the_list_that_was_scored(run, tmp_path, monkeypatch):
    """And many trials have one for the latest phase alone."""
    shutil.copytree(run, tmp_path / "1")
    results = Results(tmp_path / "1")
    assert list(results.intervals) == list(results.scored)
    low, high = results.intervals["untrained"]
    assert 0 < low < high < 100
    monkeypatch.setattr("lgl_plugin.report.results.BOOTSTRAP_TRIALS", 40_000)
    assert list(Results(tmp_path / "1").intervals) == ["iteration 2, gated"]
    trials = tmp_path / "trials.txt"
    lines = run.with_name("trials.txt").read_text().splitlines(keepends=True)
    trials.write_text("".join(lines[1:] + lines[:1]))
    path = tmp_path / "1" / "state.json"
    moved = path.read_text().replace(str(run.with_name("trials.txt")), "TRIALS")
    path.write_text(moved.replace("TRIALS", str(trials)))
    assert Results(tmp_path / "1").intervals == {}


def test_stage_one_alone_without_anything_else(tmp_path):
    folder = make_run(tmp_path / "1", speakers=False, trials=False, rounds=0)
    (folder / "manifest.csv").unlink()
    (folder / "state.json").unlink()
    write_report([folder])
    text = read(folder)
    assert FAILED not in text
    titles = re.findall(r'<h2 id="h\d">([^<]*)</h2>', text)
    assert titles == ["Quality", "Training"]


def test_speakers_unknown_and_no_trials(tmp_path):
    """Quality is measured all the same, and shown first."""
    folder = make_run(tmp_path / "1", speakers=False, trials=False, rounds=1)
    write_report([folder])
    # Without the figures' base64, in which any three letters may stand.
    text = re.sub(r"data:[^\"']*", "", read(folder))
    assert FAILED not in text and "NMI" not in text
    facts = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text)
    assert facts[:3] == [
        ("pseudo-EER %, held out", "10.0"),
        ("mean cosine, held out", "0.12"),
        ("dimensions, held out", "12.0"),
    ]
    header = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("phase", "pseudo-EER %", "mean cosine", "dimensions")
    )
    assert header in text
    # A table has no column and no row without a figure.
    assert "untrained" not in text and "purity" not in text
    assert (folder / "report" / "losses_1_gated.png").exists()
    assert (folder / "report" / "effective_dimensions.png").exists()
    assert not (folder / "report" / "map_speakers.png").exists()


def test_unlabelled_runs_compared(tmp_path):
    kind = dict(speakers=False, trials=False, rounds=0)
    runs = [make_run(tmp_path / str(n), n, **kind) for n in (1, 2)]
    text = write_report(runs).read_text()
    assert FAILED not in text and "pseudo-EER %" in text
    assert (tmp_path / "1/report/comparison/error_rate_by_phase.png").exists()


def test_clusters_are_listed_and_played(run, tmp_path):
    """Only what lies below the data folder, and is there, has a player."""
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    data = tmp_path / "my data"
    (data / "s1").mkdir(parents=True)
    (data / "s1" / "10.wav").touch()
    (tmp_path / "11.wav").touch()
    state = json.loads((folder / "state.json").read_text())
    for settings in state["settings"].values():
        settings["data_folder"] = str(data)
    (folder / "state.json").write_text(json.dumps(state))
    path = folder / "manifest.csv"
    text = path.read_text().replace("root/s1/11.wav", "root/../11.wav")
    path.write_text(text.replace("root/s1/12.wav,0,32", "root/s1/10.wav,16,48"))
    (folder / "iter2/labels/labels.csv").write_text(
        "ID,label\n" + "".join(f"s1/{n}.wav,4\n" for n in range(10, 14))
    )
    text = html.unescape(parts(folder, "recordings"))
    assert "1 of 1 clusters, iteration 2, the largest first" in text
    assert "<summary>cluster 4: 4 utterances</summary>" in text
    assert all(f"s1/{n}.wav</li>" in text for n in range(10, 14))
    assert re.findall('<audio controls preload="none" src="([^"]*)"', text) == [
        "../../my%20data/s1/10.wav#t=0.000,2.000",
        "../../my%20data/s1/10.wav#t=0.001,2.001",
    ]


def test_half_way_and_damaged(run, tmp_path):
    """A damaged part costs itself alone, and the page says so."""
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    change(folder, "settings", n_iterations=3)
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"stage": 2, "iter')
    (folder / "iter2" / "gated" / "scores.npz").write_bytes(b"PK torn")
    shutil.rmtree(folder / "iter2" / "embeddings")
    text = parts(folder, "det", "clusters", "embedding_map")
    text = html.unescape(text)
    assert "Could not be made: det:" in text
    assert "By pseudo-label, iteration 1" in text  # the last one whole
    assert "next step: iter3/embeddings" in text
    assert text.count(FAILED) == 1


def test_warnings_are_raised(run, tmp_path):
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    records = [
        {"stage": 2, "iteration": 2, "phase": "gated", "epoch": 2,
         "skipped_steps": 7, "selected_share": 0.002, "tau": 1.0},
        {"stage": 2, "iteration": 2, "phase": "after gated", "eer": 26.0},
    ]  # fmt: skip
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.writelines(json.dumps(record) + "\n" for record in records)
    (folder / "bad_files.txt").write_text("a.wav\tcut short\nb.wav\tempty\n")
    log = (
        "2026-01-02 03:04:05,678 - a.b - INFO - fine\nnot shown\n"
        "2026-01-02 03:04:06,678 - a.b - WARNING - seen twice\n"
        "2026-01-02 03:04:07,678 - a.b - WARNING - seen twice\n"
        "2026-01-02 03:04:08,678 - a.b - ERROR - Exception:\n"
        "Traceback\n  File\nOSError: disk full\n"
    )
    (folder / "stage1" / "log.txt").write_text(log)
    text = parts(folder, "warnings")
    assert "7 training steps were skipped" in text
    assert "an EER of 26.0 % is above the 25.0 %" in text
    baseline = {"stage": 0, "phase": "log-mel statistics", "eer": 25.0}
    baseline["eer_backend"] = 27.0
    after = {**records[1], "eer_backend": 26.5}
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.writelines(json.dumps(r) + "\n" for r in (baseline, after))
    page = parts(folder)  # under the same back-end, it is below
    assert "is above the" not in page
    assert "below the 27.0 % of log-mel statistics, both under" in page
    assert "the gate lets only 0.2 % through" in text
    assert "2 utterances could not be used" in text
    assert "<td>cut short</td>" in text
    assert "<td>seen twice</td><td>2</td><td>2026-01-02 03:04:07</td>" in text
    assert "<td>Exception: … OSError: disk full</td>" in text
    assert "not shown" not in text


class Reader(HTMLParser):
    """The texts and the tags of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(page)

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


HOSTILE = "</td><script>alert('1')</script>\"&lt;"


def fill(folder, text):
    """Puts a text wherever a page takes one."""

    def part():
        yield text
        yield {text: text}
        yield [text]
        yield Links({text: text})
        yield Table(text, [text, text], [[text, text]], {text: 1})
        yield Table(text, [text], [[text]], prose=True)
        yield Table(text, [text], [[text]], folded=True)
        yield Summary(True, text)
        yield Command(text, text)
        yield Recordings(text, {text: [(text, text)]})
        yield Figure("sizes", figures.cluster_sizes({"a": [1]}), text, text)
        raise ValueError(text)

    page = Page(folder, text)
    blocks = page.collect(part)
    assert page.failures == [f"part: ValueError: {text}"]
    return page.write(blocks, {text: blocks}, text).read_text()


def test_whatever_the_text_it_stays_text(tmp_path):
    """The same tags, and the text as it was."""
    harmless = Reader(fill(tmp_path, "harmless"))
    hostile = Reader(fill(tmp_path, HOSTILE))
    assert hostile.tags == harmless.tags
    count = harmless.texts.count("harmless")
    assert count > 10 and hostile.texts.count(HOSTILE) == count


def test_no_file_can_write_into_the_page(run, tmp_path):
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    (folder / "bad_files.txt").write_text(f"{HOSTILE}\t{HOSTILE}\n")
    change(folder, "settings", **{HOSTILE: HOSTILE})
    log = f"2026-01-02 03:04:05,678 - a.b - ERROR - {HOSTILE}\n"
    (folder / "stage1" / "log.txt").write_text(log)
    (folder / "starts.jsonl").write_text(json.dumps({"command": HOSTILE}))
    page = Reader(parts(folder, "configuration", "starts", "warnings"))
    assert "script" not in page.tags
    assert page.texts.count(HOSTILE) == 6


def test_command_compares(tmp_path, capsys, monkeypatch):
    """Two seeds of one kind, and a run with another gate."""
    one = {"Quality": (sections.error_rate_by_phase,)}
    monkeypatch.setattr(sections, "SECTIONS", one)
    make_run(tmp_path / "1")
    other = make_run(tmp_path / "2", seed=2)
    ungated = make_run(tmp_path / "1-b", gate="b", trials=False, rounds=1)
    main(["report", str(tmp_path / "1"), str(other), str(ungated)])
    printed = capsys.readouterr().out
    of_a_kind, ungated_alone = printed.split("\n1, 2:\n")[1].split("\n1-b:\n")
    assert "| iteration 1, gated | 18.0 (18.0 to 18.0) |" in of_a_kind
    assert (
        "| iteration 1, gated |" in ungated_alone
        and "to" not in (ungated_alone.split("Page:")[0])
    )
    page = tmp_path / "1" / "report" / "comparison" / "index.html"
    assert f"Page: {page}" in printed
    text = page.read_text()
    assert FAILED not in text
    groups = re.findall(r'scope="colgroup" colspan="(\d)">([^<]*)<', text)
    assert [name for _, name in groups] == ["1, 2", "1-b"]
    spans = sum(int(span) for span, _ in groups)
    rows = text[text.index("<tbody>") : text.index("</tbody>")].split("<tr>")
    assert {row.count("<td>") for row in rows[1:]} == {spans}
    differing = re.findall(r'<th scope="row">(stage[^<]*)</th>', text)
    assert differing == [
        "stage 1: seed",
        "stage 2: seed",
        "stage 2: n_iterations",
        "stage 2: gate.name",
    ]
    for link in re.findall(r'<a href="([^#"]*)"', text):
        assert (page.parent / link).exists()


def test_a_run_that_is_named_twice_counts_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sections, "SECTIONS", {})
    folder = make_run(tmp_path / "1")
    main(["report", str(folder), f"{folder}/../1"])
    printed = capsys.readouterr().out
    assert "| iteration 1, gated | 18.0 |" in printed
    assert printed.count("Page:") == 1


def test_runs_of_one_kind_lie_where_they_like(tmp_path):
    """Folders and workers are no settings of a method; data are by content."""
    runs = []
    for n in (1, 2, 3):
        folder = make_run(tmp_path / f"run {n}", seed=n, rounds=0)
        state = json.loads((folder / "state.json").read_text())
        state["settings"]["stage 1"] |= {"output_folder": str(folder)}
        state["settings"]["stage 1"] |= {
            "dataloader_options": {"num_workers": n}
        }
        state["inputs"] = {"stage 1": {"manifest": "abc"[n // 3]}}
        (folder / "state.json").write_text(json.dumps(state))
        runs.append(Results(folder))
    assert [*group_by_settings(runs)] == ["run 1, run 2", "run 3"]


def test_a_folder_without_metrics_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="is it the output_folder"):
        write_report([tmp_path])
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert f"{tmp_path} holds no metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ['<script>alert(1)<b>$\\frac{$ |`x`"&_$', "$x_{$"]
)
def test_no_name_of_a_run_can_write_into_its_page(tmp_path, name):
    """Nor stop a figure: from a $ to the next is mathematics in one."""
    runs = [
        make_run(tmp_path / name / "1", rounds=1),
        make_run(tmp_path / f"_{name}" / name, rounds=1, seed=2),
    ]
    for page in (write_report(runs[:1]), write_report(runs)):
        page = Reader(page.read_text())
        assert "script" not in page.tags
        assert any(name in text for text in page.texts)
        assert not any(FAILED in text for text in page.texts)


def test_a_gate_that_inflates_costs_its_section_alone(run, tmp_path):
    folder = tmp_path / "1"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    path = folder / "iter1" / "gated" / "gate.npz"
    np.savez_compressed(path, losses=np.zeros(2**28, np.uint8))
    text = parts(folder, "gates")
    assert "gate.npz is damaged: its arrays take 268,435,584 bytes" in text


def test_drawing_leaves_nothing_of_matplotlib_in_the_log(tmp_path, caplog):
    """SpeechBrain's log.txt takes what any logger writes."""
    caplog.set_level(logging.DEBUG)
    with matplotlib.rc_context({"font.family": ["Nowhere", "DejaVu Sans"]}):
        drawing = figures.cluster_sizes({"a": [3, 2, 1]})
        figures.save(drawing, tmp_path, "sizes")
    assert not [r for r in caplog.records if r.levelno < logging.WARNING]
