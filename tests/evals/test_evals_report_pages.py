"""Tables, pictures and comparisons of reports, from rows whose figures are made up."""

import copy
import json

import infer_cases as cases
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from core.config import UserError
from core.storage.output import signed
from evals import bench
from evals.config import BenchConfig
from evals.report import cases as variants
from evals.report.measuring.measure import Measured
from evals.report.measuring.peaks import Peaks
from evals.report.rows import measured, plan, planned
from evals.report.show import compare, figures, folder, heat, plots, tables
from model.attention.spec import full, sliding

SIZES = (1024, 2048, 4096, 8192)
PICTURES = ["decode.png", "prefill.png", "memory.png", "cost.png", "quality.png", "needle.png"]


@pytest.fixture(scope="module")
def report():
    """Of a sliding model and full attention everywhere; the last row does not fit."""
    config = cases.model_config(context=8192, pattern=(sliding(512), full()))
    settings = BenchConfig(contexts=SIZES, price_per_hour=2.0)
    rows = []
    with cases_mesh():
        for case in variants.of(cases.random_model(config)):
            for n in SIZES:
                row = plan(case, n, settings, 12_000_000)
                values = planned(row, settings)
                if row.reason is None:
                    slow = 2.0 if case.attention == "full" else 1.0
                    values |= measured(row, settings, made_up(n, slow), Peaks(1e9, 1e11), 1)
                    values["peak_bytes_measured"] = 1.1 * values["peak_bytes"]
                if case.own and row.reason is None:
                    values["quality"] = quality(n)
                rows.append(values)
    head = dict(device="1 x cpu", config="made up", weights="none", parameters=17552)
    model = dict(num_layers=4, pattern=[dict(window=512), dict(window=0)], dtype="float32")
    rest = dict(peaks=None, quality_text="noise", seconds=1.0, bench={})
    effective = {"sliding, plain": dict(length=2048, kinds=13)}
    return dict(**head, model=model, rows=rows, effective_length=effective, **rest)


def cases_mesh():
    return bench.jax.set_mesh(bench.make_mesh(bench.MeshConfig(data=8)))


def made_up(n, slow):
    curve = [(n // 4 * i, slow * (n / 4000) * (i / 4) ** 1.3) for i in (1, 2, 3, 4)]
    step = slow * n / 1e6
    return Measured(
        curve[-1][1], curve, curve[-1][1] + step, step, [step] * 100, 9, 9, 9000, 9, 1.0
    )


def quality(n):
    scores = {kind: 100.0 - n / 90 - i for i, kind in enumerate(bench.quality.tasks.KINDS)}
    cells = [dict(depth=d, score=max(0.0, 100 - n / 100 * d)) for d in (0.0, 0.5, 1.0)]
    buckets = [dict(first=2**i, last=2 ** (i + 1) - 1, loss=4 - i / 5, tokens=2**i) for i in (6, 8)]
    found = dict(tasks=scores, ruler=90 - n / 200, ruler_kinds=13, needle=cells, loss=3.5)
    return {**found, "loss_by_position": buckets, "skipped": {"qa_1": "no questions"}}


def shades(path):
    """Different colours in a picture, and the share of it that is not white."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).astype(np.uint8).reshape(-1, 3)
    return len(np.unique(image, axis=0)), (image < 250).any(axis=1).mean()


def test_pictures_are_there_and_not_blank(report, tmp_path):
    assert plots.draw([("", report)], tmp_path) == PICTURES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    for name in PICTURES:
        colours, inked = shades(tmp_path / name)
        assert colours > 50 and inked > 0.02, name


def test_pictures_without_figures_are_not_made(report, tmp_path):
    plots.draw([("", report)], tmp_path)
    bare = copy.deepcopy(report)
    for row in bare["rows"]:
        row |= dict(quality={}, cost_per_1k_tokens=None, cost_per_1k_prefill_tokens=None)
    assert plots.draw([("", bare)], tmp_path) == PICTURES[:3]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES[:3])


def test_every_axis_is_named_and_lines_are_told_apart(report):
    series = plots.every_series([("", report)])
    drawn = [plots.decode(series), plots.prefill(series), plots.quality(series)]
    drawn += [heat.memory(series), heat.needle(series), plots.cost(series)]
    for figure in drawn:
        for axes in figure.axes:
            assert axes.get_ylabel(), axes
            assert axes.get_xlabel() or axes.get_ylabel() == "found, percent"
    (axes,) = plots.decode(series).axes
    lines = [one for one in axes.lines if len(one.get_xdata())]
    styles = [(one.get_color(), one.get_marker(), one.get_linestyle()) for one in lines]
    assert len(set(styles)) == len(lines) == 4
    assert {colour for colour, _, _ in styles} <= {*figures.PALETTE}
    floors = [line for line in lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in floors] == [
        [y for _, y in one.points("roofline_ms")] for one in series
    ]
    assert heat.needle(series).axes[0].images[0].get_cmap().name == "cividis"
    threshold = [line for line in plots.quality(series).axes[1].lines if "85.6" in line.get_label()]
    assert list(threshold[0].get_ydata()) == [85.6, 85.6]


def test_the_stack_of_memory_adds_up(report):
    (axes, _) = heat.memory(plots.every_series([("", report)])).axes
    bars = axes.containers
    top = bars[-1][0].get_y() + bars[-1][0].get_height()
    assert top * 2**20 == pytest.approx(report["rows"][0]["peak_bytes"])


def test_names_of_tokens():
    found = [figures.name_of_tokens(n) for n in (100, 1000, 1024, 1536, 16384, 2**20, 3 * 2**19)]
    assert found == ["100", "1,000", "1K", "1.5K", "16K", "1M", "1.5M"]


def test_markdown_has_each_row_and_why_one_is_missing(report):
    text = tables.page(report, ["decode.png"])
    assert "| 8,192 | sliding |" in text and "## Not measured" in text
    reasons = [row["reason"] for row in report["rows"] if row["reason"]]
    assert len(reasons) == 1 and reasons[0] in text
    assert "by RULER's rule" in text and "**2,048 tokens**" in text
    assert "| 64 to 127 | 256 to 511 |" in text
    assert "| 1,024 | sliding | plain | 2.800 | 2.400 |" in text
    assert "- 1,024 tokens, qa_1: no questions" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for head, line in zip(rows, rows[1:], strict=False):
        if line.startswith("|---"):
            assert head.count("|") == line.count("|")


def saved(folder, report, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "report.json").write_text(json.dumps(report))
    return str(folder / name)


@pytest.fixture
def two(report, tmp_path):
    """Reports A and B, of which B decodes in half the time and knows no full attention at 2K."""
    other = copy.deepcopy(report)
    for row in other["rows"]:
        if row["decode_ms_per_token"]:
            row["decode_ms_per_token"] /= 2
    other["rows"] = [r for r in other["rows"] if (r["attention"], r["context"]) != ("full", 2048)]
    return saved(tmp_path, report, "a/bench"), saved(tmp_path, other, "b/bench")


def test_compare_lays_reports_over_each_other(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)  # no model is run
    config = BenchConfig(compare=(two[0], two[1] + "/report.json"), output=str(tmp_path / "out"))
    found = bench.main(cases.experiment("nowhere", bench=config))
    assert found["reports"] == {"a": two[0] + "/report.json", "b": two[1] + "/report.json"}
    assert len(found["rows"]) == 15
    pairs = zip(found["rows"], found["rows"][1:], strict=False)
    halves = [b["ratios"] for a, b in pairs if b["report"] == "b" and b["fits"]]
    assert len(halves) == 6
    for ratios in halves:
        assert ratios["decode_ms_per_token"] == 0.5 and ratios["prefill_seconds"] == 1
    text = (tmp_path / "out/compare.md").read_text()
    assert "(0.50x)" in text and "Ratios are to a." in text
    assert "| 1,024 | sliding | plain | b |" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"compare.json", "compare.md", *PICTURES}
    series = plots.every_series([(label, read(two, label)) for label in "ab"])
    assert [one.label for one in series] == ["a: sliding", "a: full", "b: sliding", "b: full"]
    assert [one.look for one in series] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert len({str(one.look.style()) for one in series}) == 4
    assert "(0.50x)" in capsys.readouterr().out


def read(two, label):
    return json.loads(open(two["ab".index(label)] + "/report.json").read())


def test_what_cannot_be_compared_is_refused(two, tmp_path):
    def run(*paths):
        bench.main(cases.experiment(tmp_path, bench=BenchConfig(compare=paths)))

    with pytest.raises(UserError, match=r"bench.compare=gone: there is no gone"):
        run(two[0], "gone")
    with pytest.raises(UserError, match="names one report twice"):
        run(two[0], two[0] + "/report.json")
    for content, message in (
        ("{", "is not JSON"),
        ("[1]", "is no report of evals.bench: it has no rows"),
        ('{"rows": []}', "is no report of evals.bench: it has no rows"),
        ('{"rows": [{"context": 1}]}', "a row has no 'attention'"),
    ):
        path = tmp_path / "other.json"
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            run(two[0], str(path))
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("decode.png", "mine", "decode.png is there already, and this command did not write it"),
        ("compare.json", "{}", "compare.json is there already"),
        (
            "compare.md",
            signed("# Context windows compared").replace("w", "W"),
            "compare.md is there already",
        ),
        ("report.json", "{}", "holds report.json, whose pictures would be replaced"),
        ("", "mine", "out is a file: name a folder"),
    ],
)
def test_files_of_the_user_are_not_replaced(two, tmp_path, name, content, message):
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        bench.main(
            cases.experiment(tmp_path, bench=BenchConfig(compare=two, output=str(tmp_path / "out")))
        )
    assert path.read_text() == content and {*(tmp_path / "out").rglob("*")} <= {path}


def test_a_report_knows_its_own_files_and_keeps_lines_of_others(report, tmp_path):
    data, page = folder.claim(tmp_path, "report")
    data.write(json.dumps(report))
    page.write(signed(tables.page(report, [])))
    figures.save(Figure(), tmp_path / "decode.png")
    (tmp_path / "rows.jsonl").write_text('{"key": "a", "of": {}, "result": 1}\n{"ke')
    folder.claim(tmp_path, "report")
    for content in ('{"mine": 1}\n', "mine"):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UserError, match="rows.jsonl is there already"):
            folder.claim(tmp_path, "report")


def test_labels_are_what_differs(tmp_path):
    paths = []
    for name in ("x/runs/one/bench", "x/runs/two/bench"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text("{}")
        paths.append(str(tmp_path / name))
    assert [label for label, _ in compare.labels(paths)] == ["one", "two"]
