import base64
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from statistics import stdev
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch

from clipweld.trainer.adapters.adapter import Adapter, save_adapter
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import AdapterCorrupt, OutputError, ReportError
from clipweld.trainer.report import write, write_report
from clipweld.trainer.report.accuracy import short, spread_out
from clipweld.trainer.report.experts import chance_cosine, overlap, votes
from clipweld.trainer.report.figures import Picture
from clipweld.trainer.report.groups import Spread, sections
from clipweld.trainer.report.page import MINUS, as_text, signed
from clipweld.trainer.report.runs import VALIDATION, read_runs
from clipweld.trainer.sequence.metrics import average, forgetting, last, transfer
from clipweld.trainer.tasks import load_task, validation

MODULES = {
    "transformer.resblocks.0.mlp.c_fc": 32,
    "visual.transformer.resblocks.0.attn.q_proj": 16,
    "visual.transformer.resblocks.0.mlp.c_fc": 64,
    "visual.transformer.resblocks.1.attn.q_proj": 16,
}
ZERO_SHOT = {"digits": 50.0, "flags": 10.0, "emoji": 30.0}
HOSTILE = "<b>$x$ & co</b>"


def write_run(
    folder,
    method="pool",
    order=("digits", "flags"),
    *,
    seed=0,
    matrix=None,
    union=True,
    classes=False,
    sources=(),
    **config,
):
    """Write a record as ``trainer sequence`` does; accuracy is by default 60% on learned tasks, zero-shot on others."""
    order_seed = config.pop("order_seed", None)
    if matrix is None:
        matrix = [[60.0 if j <= i else ZERO_SHOT[task] for j, task in enumerate(order)] for i in range(len(order))]
    result = {
        "method": method,
        "tasks": list(order),
        "tested": list(order),
        "label_space": "task",
        "seed": seed,
        "zero_shot": [ZERO_SHOT[task] for task in order],
        "matrix": matrix,
        "transfer": transfer(matrix),
        "average": average(matrix),
        "last": last(matrix),
        "forgetting": forgetting(matrix),
        "trainable_parameters": 2000,
        "kept_parameters": {"pool": 1000, "lora": 3000}.get(method, 100_000),
        "seconds_per_task": [1.5] * len(matrix),
    }
    if classes:
        result["class_matrix"] = [[cell - 7 for cell in row] for row in matrix]
    settings = {**asdict(train_config("mini", method, seed=seed, ago="mean")), **config}
    results = {"task": result, "union": {**result, "label_space": "union"}} if union else {"task": result}
    record = {
        "model": "mini", "pretrained": "mini", "base_fingerprint": "ab" * 32, "method": method, "tasks": list(order),
        "watch": [], "sources": list(sources), "order_seed": order_seed, "devices": 1, "precision": "32-true",
        "config": settings, "results": results,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "sequence.json").write_text(json.dumps(record))
    return folder


def test_last_over_classes_is_shown_where_the_record_has_it(tmp_path):
    write_run(tmp_path / "new", classes=True)
    write_run(tmp_path / "old", "lora")
    (section,) = sections(read_runs(tmp_path))
    pool, lora = section.groups
    assert pool.last_classes("task").values == (pool.last("task").mean - 7,)
    assert lora.last_classes("task") is None
    write_report(tmp_path)
    assert "Last over classes" in (tmp_path / "report.html").read_text(encoding="utf-8")


def make_adapter(task, seed=0, rank=6, experts=2, counted=True):
    draw = torch.Generator().manual_seed(seed)
    tensors, counts = {}, {}
    for module, width in MODULES.items():
        tensors[f"{module}.lora_A"] = torch.randn(experts, 8, generator=draw)
        tensors[f"{module}.lora_B"] = torch.randn(width, experts, generator=draw)
        counts[module] = torch.randint(1, 100, (rank,), generator=draw).tolist() if counted else [0] * rank
    return Adapter(
        task=task, class_names=("a", "b"), templates=("{}",), model_name="mini", pretrained="mini",
        base_fingerprint="0" * 64, parents=(), scaling=0.1, seed=seed, accuracy={}, config={},
        activation_counts=counts, tensors=tensors,
    )  # fmt: skip


def leave_adapters(folder, order=("digits", "flags"), **options):
    for place, task in enumerate(order):
        save_adapter(make_adapter(task, seed=place, **options), folder / "adapters" / f"{task}.safetensors")


class Page(HTMLParser):
    """The page's table rows, as lists of texts, and pictures, as attributes; fails on tags that are not nested."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, label):
        """Return the first row with this label in a table of metrics."""
        return next(row for row in self.rows if row[0] == label and len(row) == 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three seeds of the pool, one pool run without AGO and with a hostile setting, one of lora, one of joint."""
    root = tmp_path_factory.mktemp("study")
    for seed, (transferred, ended) in enumerate([(10.0, 60.0), (14.0, 70.0), (18.0, 80.0)]):
        matrix = [[90.0, transferred], [80.0, 2 * ended - 80.0]]
        leave_adapters(write_run(root / "pool" / str(seed), seed=seed, matrix=matrix))
    leave_adapters(write_run(root / "off", ago="off", note=HOSTILE, matrix=[[90.0, 8.0], [60.0, 50.0]]))
    leave_adapters(write_run(root / "lora", "lora", matrix=[[90.0, 4.0], [40.0, 62.0]]), counted=False)
    write_run(root / "joint", "joint", matrix=[[88.0, 84.0]])
    settings = dict(matplotlib.rcParams)
    assert write_report(root) == root / "report.html"
    assert dict(matplotlib.rcParams) == settings
    return root


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_tables_hold_values_computed_by_hand(page):
    assert page.row("zero-shot")[3:] == ["1", "10.0", "", "30.0", "30.0", "", ""]
    assert page.row("pool")[1:4] == ["3", "3", "1"]
    assert page.row("pool")[4:] == ["14.0 ± 4.0", "+4.0 ± 4.0", "61.0 ± 6.0", "70.0 ± 10.0", "—", "10.0 ± 0.0"]
    assert page.row("lora")[1:] == ["1", "1", "1", "4.0", f"{MINUS}6.0", "49.0", "51.0", "—", "50.0"]
    assert page.row("joint")[1:] == ["1", "1", "1", "—", "—", "86.0", "86.0", "—", "—"]


def test_groups_are_compared_with_the_reference_over_shared_seeds_only(page):
    row = next(row for row in page.rows if row[0].startswith("pool, ago=off") and len(row) == 6)
    assert row[1:] == [
        "1",
        f"{MINUS}2.0",
        f"{MINUS}3.0",
        f"{MINUS}5.0",
        "+20.0",
    ]  # against seed 0 of the pool: 10, 55, 60, 10


def test_best_values_are_bold_and_joint_is_excluded(run):
    bold = re.findall(r"<b>([^<]*)</b></td>", (run / "report.html").read_text(encoding="utf-8"))
    assert bold == 2 * ["14.0 ± 4.0", "61.0 ± 6.0", "70.0 ± 10.0", "10.0 ± 0.0"]


def test_the_page_is_self_contained(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    for forbidden in ("http:", "https:", "<script", "<link", "<iframe", "@import", "url(", "srcset"):
        assert forbidden not in text
    assert all(value.startswith("data:image/png;base64,") for value in re.findall(r'(?:src|href)="([^"]*)', text))


def test_every_figure_is_a_png_and_shown_on_the_page(run, page):
    figures = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    assert sorted(figures) == [
        "accuracy-task.png", "accuracy-union.png", "comparison-task.png", "comparison-union.png", "overlap.png",
        "parameters.png", "votes.png",
    ]  # fmt: skip
    shown = [base64.b64decode(picture["src"].partition("base64,")[2]) for picture in page.pictures]
    assert sorted(shown) == sorted(figures.values())
    assert all(png.startswith(b"\x89PNG") for png in shown)
    assert all(len(picture["alt"]) > 40 for picture in page.pictures)


def test_hostile_settings_are_escaped(run, page):
    assert "<b>$x$" not in (run / "report.html").read_text(encoding="utf-8")
    assert f"pool, ago=off, note={HOSTILE}" in page.text


def test_overlap_is_shown_with_and_without_ago(run, page):
    alt = next(picture["alt"] for picture in page.pictures if "overlap" in picture["alt"])
    assert "with AGO: pool (seed 0)" in alt
    assert "without AGO: pool, ago=off" in alt
    found = overlap(read_runs(run)[-1].adapters())
    row = next(row for row in page.rows if row[0] == "pool" and len(row) == 5)
    assert row[1:3] == ["3", f"{found.mean_cosine:.3f} ± 0.000"]
    assert float(row[3].partition(" ")[0]) == pytest.approx(found.mean_product, abs=5e-3)


@pytest.mark.slow
def test_writing_a_report_again_changes_nothing_and_removes_only_its_own_old_figures(tmp_path):
    root = write_run(tmp_path / "one", "finetune", ("digits",), union=False)
    write_report(root)
    first = (root / "report.html").read_bytes()
    assert sorted(path.name for path in (root / "figures").iterdir()) == [
        "accuracy-task.png", "comparison-task.png", "parameters.png",
    ]  # fmt: skip
    for name in ("section1-votes.png", "mine.png"):
        (root / "figures" / name).write_bytes(b"")
    write_report(root)
    assert (root / "report.html").read_bytes() == first
    names = {path.name for path in root.rglob("*")}
    assert "mine.png" in names
    assert "section1-votes.png" not in names
    assert not any(name.startswith(".") for name in names)
    page = Page(first.decode())
    assert "No figure: no run of the pool is here." in page.text
    assert "No figure: one task alone overlaps with nothing." in page.text
    assert "Label space “union” is left out" in page.text


def test_labels_name_the_settings_that_differ_from_the_method_s_reference(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"plain{seed}", seed=seed)
    write_run(tmp_path / "fixed", router="fixed", lr=1e-4, matrix=[[99.0, 99.0], [99.0, 99.0]])
    write_run(tmp_path / "shuffled", order=("flags", "digits"), order_seed=7)
    write_run(tmp_path / "lora", "lora", lr=1.0)
    write_run(tmp_path / "strange", "strange")
    (section,) = sections(read_runs(tmp_path))
    labels = [(group.label, len(group.runs)) for group in section.groups]
    assert labels == [("pool", 3), ("pool, router=fixed, lr=0.0001", 1), ("lora", 1), ("strange", 1)]
    assert [group.is_reference for group in section.groups] == [True, False, True, True]
    assert section.reference.orders == {("digits", "flags"), ("flags", "digits")}
    assert section.representative(section.reference).name == "plain0"


def test_among_equally_many_runs_the_reference_has_the_best_last_accuracy(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", router="fixed", matrix=[[60.0, 10.0], [60.0, 61.0]])
    (section,) = sections(read_runs(tmp_path))
    assert [group.label for group in section.groups] == ["pool", "pool, router=learned"]


def test_the_setting_that_ablations_vary_is_the_reference(tmp_path):
    write_run(tmp_path / "base", iterations=50)
    write_run(tmp_path / "better", iterations=50, router="fixed", matrix=[[60.0, 10.0], [60.0, 61.0]])
    for seed in (0, 1):
        write_run(tmp_path / f"slower{seed}", iterations=50, lr=1e-4, seed=seed)
    (section,) = sections(read_runs(tmp_path))
    assert [group.label for group in section.groups] == ["pool", "pool, lr=0.0001", "pool, router=fixed"]


def test_the_model_s_default_settings_are_the_reference_if_any_run_has_them(tmp_path):
    write_run(tmp_path / "default", ago="sum", matrix=[[60.0, 10.0], [10.0, 10.0]])
    for seed in (0, 1):
        write_run(tmp_path / f"better{seed}", router="fixed", seed=seed)
    (section,) = sections(read_runs(tmp_path))
    assert [group.label for group in section.groups] == ["pool", "pool, router=fixed, ago=mean"]


def test_a_record_from_before_a_setting_is_one_with_the_setting_off(tmp_path):
    write_run(tmp_path / "new")
    write_run(tmp_path / "old", seed=1)
    record = json.loads((tmp_path / "old/sequence.json").read_text())
    for name in ("balance", "random_crop", "coefficients"):
        del record["config"][name]
    record.pop("precision", None)
    (tmp_path / "old/sequence.json").write_text(json.dumps(record))
    write_run(tmp_path / "on", balance=True)
    (section,) = sections(read_runs(tmp_path))
    assert [(group.label, len(group.runs)) for group in section.groups] == [("pool", 2), ("pool, balance=True", 1)]


def test_zero_shot_of_transfer_follows_each_run_s_own_order(tmp_path):
    write_run(tmp_path / "a", order=("digits", "flags"), matrix=[[90.0, 12.0], [90.0, 90.0]])
    write_run(tmp_path / "b", order=("flags", "digits"), matrix=[[90.0, 58.0], [90.0, 90.0]])
    (section,) = sections(read_runs(tmp_path))
    assert sorted(section.reference.gain("task").values) == [2.0, 8.0]
    assert sorted(section.zero_shot_transfer("task").values) == [10.0, 50.0]
    assert section.zero_shot("task").values == (30.0,)


def test_runs_on_other_tasks_or_images_get_their_own_sections(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", order=("digits", "emoji"))
    write_run(tmp_path / "c", sources=[f"shipped{VALIDATION}"])
    found = sections(read_runs(tmp_path))
    assert [(section.order, section.validation) for section in found] == [
        (("digits", "flags"), False),
        (("digits", "emoji"), False),
        (("digits", "flags"), True),
    ]


def test_validation_images_are_recognised_by_their_source():
    assert validation(load_task("emoji")).source.endswith(VALIDATION)


def test_one_run_has_no_spread():
    assert as_text(Spread((70.0,))) == "70.0"
    assert as_text(None) == "—"
    assert as_text(Spread((70.0, 70.02))) == "70.0 ± <0.1"
    assert signed(Spread((-0.04,))) == "0.0"
    assert signed(Spread((-1.0, -2.0, -4.0))) == f"{MINUS}2.3 ± {stdev((1, 2, 4)):.1f}"


def test_overlap_equals_a_loop_over_pairs_of_columns():
    adapters = [make_adapter(task, seed) for seed, task in enumerate(("digits", "flags", "emoji"))]
    adapters[1].tensors["visual.transformer.resblocks.0.attn.q_proj.lora_B"][:, 0] = 0.0
    found = overlap(adapters)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            cosines, products = [], []
            for module in MODULES:
                pairs = [
                    (b, c)
                    for k, b in enumerate(one.experts(module)[1].double().T)
                    for n, c in enumerate(other.experts(module)[1].double().T)
                    if (i, k) != (j, n)
                ]
                products.append(np.mean([abs(float(b @ c)) for b, c in pairs]))
                directed = [abs(float(b @ c / (b.norm() * c.norm()))) for b, c in pairs if b.norm() and c.norm()]
                cosines += [np.mean(directed)] if directed else []
            assert found.cosine[i, j] == pytest.approx(np.mean(cosines), abs=1e-9)
            assert found.product[i, j] == pytest.approx(np.mean(products), abs=1e-9)
    assert found.mean_cosine == pytest.approx((found.cosine[1, 0] + found.cosine[2, 0] + found.cosine[2, 1]) / 3)
    assert overlap(adapters[:1]) is None


def test_a_task_with_one_column_has_no_overlap_with_itself():
    found = overlap([make_adapter(task, experts=1) for task in ("digits", "flags")])
    assert np.isnan(found.cosine.diagonal()).all()
    assert found.mean_cosine == pytest.approx(1.0)  # both tasks have the same seed, hence the same columns


@pytest.mark.parametrize("width", [1, 2, 64, 3072])
def test_the_chance_level_is_the_mean_cosine_of_random_directions(width):
    directions = np.random.default_rng(0).standard_normal((20_000, width if width < 100 else 8))
    if width < 100:
        measured = np.abs(directions[:, 0] / np.linalg.norm(directions, axis=1)).mean()
        assert chance_cosine(width) == pytest.approx(measured, rel=0.03)
    else:
        assert chance_cosine(width) == pytest.approx(math.sqrt(2 / (math.pi * width)), rel=1e-3)


def test_votes_are_shares_per_layer_with_the_image_tower_first():
    adapter = make_adapter("digits")
    adapter.activation_counts.update(
        {
            "visual.transformer.resblocks.0.attn.q_proj": [0, 1, 2, 3, 4, 10],
            "transformer.resblocks.0.mlp.c_fc": [0] * 6,
        }
    )
    found = votes([adapter])
    assert found.layers == [("image", 0), ("image", 0), ("image", 1), ("text", 0)]
    assert found.shares["digits"][0].tolist() == [0, 0.05, 0.1, 0.15, 0.2, 0.5]
    assert np.isnan(found.shares["digits"][3]).all()
    kept = [sorted(adapter.activation_counts[path])[-2:] for path in sorted(MODULES) if path.startswith("visual")]
    totals = [sum(adapter.activation_counts[path]) for path in sorted(MODULES) if path.startswith("visual")]
    assert found.kept_share("digits") == pytest.approx(np.mean([sum(k) / t for k, t in zip(kept, totals, strict=True)]))
    assert votes([make_adapter("digits", counted=False)]) is None


def test_labels_are_moved_apart_no_further_than_necessary():
    assert spread_out([0.0, 10.0], 2.0) == [0.0, 10.0]
    assert spread_out([5.0, 5.0, 5.0, 20.0], 2.0) == [3.0, 5.0, 7.0, 20.0]
    assert spread_out([], 2.0) == []


def test_counts_are_abbreviated():
    assert [short(n) for n in (7, 999, 119_808, 1_105_920, 149_600_000, 999_900)] == [
        "7",
        "999",
        "120k",
        "1.11M",
        "150M",
        "1M",
    ]


def test_a_folder_without_runs_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"'trainer sequence --out .*' writes one"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda record: "{", "EOF while parsing"),
        (lambda record: "[]", "should be an object"),
        (lambda record: json.dumps({**record, "results": {}}), "lack the label space 'task'"),
        (lambda record: json.dumps({"matrix": []}), "lacks 'base_fingerprint', 'config', 'devices', has 'matrix'"),
        (lambda record: json.dumps({**record, "order_seed": "x"}), "order_seed"),
        (lambda record: json.dumps({**record, "model": "\x1b[2J"}), "model: .* without control characters"),
        (lambda record: json.dumps({**record, "method": "lora"}), "not of its method and its tasks"),
        (lambda record: _with(record, last=None), r"task.last: Input should be a valid number"),
        (lambda record: _with(record, zero_shot=["x", 1]), r"task.zero_shot.0: Input should be a valid number"),
        (lambda record: _with(record, tested=["flags", "digits"]), "do not begin with the learned"),
        (lambda record: _with(record, tasks=[]), "not of its method and its tasks"),
        (lambda record: _with(record, zero_shot=[1.0]), "not as long as the 2"),
        (lambda record: _with(record, matrix=[[1.0, 2.0]] * 3), "3 rows of accuracies for 2"),
        (lambda record: _with(record, matrix=[[1.0, 2.0], [1.0, 200.0]]), "less than or equal to 100"),
        (lambda record: _with(record, matrix=[[1.0, 2.0], [1.0, float("nan")]]), "should be a finite number"),
        (lambda record: _with(record, matrix=7), "task.matrix: Input should be a valid"),
    ],
)
def test_a_malformed_record_is_named_and_nothing_is_written(tmp_path, spoil, reason):
    path = write_run(tmp_path / "deep" / "down") / "sequence.json"
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ReportError, match=reason) as caught:
        write_report(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def _with(record, **changes):
    record["results"]["task"].update(changes)
    return json.dumps({**record, "results": {"task": record["results"]["task"]}})


def test_a_broken_adapter_is_refused_and_nothing_is_written(tmp_path):
    folder = write_run(tmp_path / "run")
    leave_adapters(folder)
    path = folder / "adapters" / "flags.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterCorrupt, match=str(path)):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_the_earlier_report_unchanged(tmp_path, monkeypatch):
    root = write_run(tmp_path / "run", "finetune")
    (root / "report.html").write_text("earlier")
    pictures = [Picture(name, "", b"png", 1, 1) for name in ("comparison-task.png", f"{'x' * 300}.png")]
    monkeypatch.setattr(write, "view", lambda section, prefix: SimpleNamespace(pictures=pictures))
    monkeypatch.setattr(write, "render", lambda views: "later")
    with pytest.raises(OutputError, match=re.escape(f"{root}/figures/xxx")):
        write_report(root)
    assert (root / "report.html").read_text() == "earlier"
    assert sorted(path.name for path in root.rglob("*")) == ["figures", "report.html", "sequence.json"]
