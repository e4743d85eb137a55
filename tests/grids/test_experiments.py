"""Experiments files and grids: which runs they name, and which files are refused."""

from __future__ import annotations

import dataclasses

import pytest

import config
from config import RECIPES, DatasetName, TrainConfig
from files import UserError
from grids.experiments import make_grid, preset_names, read_experiments, write_yaml


def grid_of(name, dataset_chosen=False, seeds=1, **options):
    base = config.with_options(TrainConfig(), options, "test")
    return make_grid(read_experiments(name), base, dataset_chosen, seeds)


def test_every_preset_can_be_trained_and_has_a_question():
    for name in preset_names():
        experiments = read_experiments(name)
        grid = make_grid(experiments, RECIPES[experiments.recipe], False, 1)
        assert grid.name == name and grid.about and len(grid.experiments) >= 2
        settings = [experiment.settings for experiment in grid.experiments]
        assert all(settings.count(each) == 1 for each in settings), f"{name}: two equal rows"


def test_components_add_one_term_after_the_other():
    weights = [config.loss_weights(each.settings.loss) for each in grid_of("components").experiments]
    terms = [[term for term, weight in of_row.items() if weight != 0] for of_row in weights]
    assert terms == [["ce"], ["ce", "fd"], ["ce", "fd", "md"], *[["ce", "fd", "md", "ed"]] * 2]
    assert [each.settings.loss.adaptive for each in grid_of("components").experiments] == [True] * 4 + [False]


def test_half_precisions_are_compared_with_float32_and_differ_in_nothing_else():
    rows = grid_of("precision").experiments
    assert [row.settings.precision for row in rows] == ["float32", "mixed_bfloat16", "mixed_float16"]
    assert len({dataclasses.replace(row.settings, precision="float32") for row in rows}) == 1


def test_the_gpu_recipe_changes_network_and_loss_only():
    """The recipe of docs/gpu.md; TrainConfig's own warm-up, weight decay and erasing are part of it."""
    rows = [row.settings for row in grid_of("gpu-fer2013").experiments]
    assert [(row.model.arch, row.epochs, row.optimizer.learning_rate, row.loss.w_fd) for row in rows] == [
        *[("mini_xcp", 160, 2e-3, 0), ("mini_xcp", 160, 2e-3, 1)],
        *[("xcp", 80, 1e-3, 0), ("xcp", 80, 1e-3, 1)],
    ]
    shared = [(row.augmentation, row.batch_size, row.precision, row.backend, row.optimizer.average) for row in rows]
    assert (
        len(set(shared)) == 1 and shared[0][0].mixup == 0.2 and shared[0][1:] == (256, "mixed_bfloat16", "jax", 0.999)
    )


def test_rows_win_over_the_command_line_and_keep_its_other_options():
    rows = grid_of("num-embeddings", epochs=5, num_embeddings=3, w_fd=0.5).experiments
    assert [row.settings.model.num_embeddings for row in rows] == [1, 2, 4, 7, 10]
    assert {(row.settings.epochs, row.settings.loss.w_fd) for row in rows} == {(5, 0.5)}


def test_a_data_set_of_the_command_line_replaces_those_of_the_file():
    assert {e.settings.dataset.value for e in grid_of("components").experiments} == {"synthetic"}
    assert [e.settings.dataset.value for e in grid_of("paper").experiments][::2] == ["affectnet", "rafdb", "fer2013"]
    chosen = grid_of("paper", dataset_chosen=True, dataset="rafdb").experiments
    assert [e.settings.dataset for e in chosen] == [DatasetName.rafdb] * 2


def test_runs_come_seed_by_seed():
    grid = grid_of("loss-weights", seeds=2, seed=5)
    runs = grid.runs()
    assert grid.seeds == (5, 6) and [seed for _, seed in runs] == [5] * 6 + [6] * 6
    assert [e.name for e, _ in runs[:6]] == [e.name for e, _ in runs[6:]]
    assert runs[0][0].with_seed(6) == dataclasses.replace(runs[0][0].settings, seed=6)


YAML = """
about: Does a ramp help?
base: {epochs: 3, w_ed: 0, adaptive: false}
rows:
  - {name: no ramp}
  - {name: ramp, ramp_epochs: 1.5, w_ed: 2, w_ce: null}
"""


def test_base_holds_for_all_rows(tmp_path):
    path = tmp_path / "ramp.yaml"
    path.write_text(YAML)
    grid = grid_of(str(path))
    assert (grid.name, grid.about) == ("ramp", "Does a ramp help?")
    plain, ramp = (e.settings for e in grid.experiments)
    assert (plain.epochs, plain.loss.w_ed, plain.loss.adaptive, plain.loss.ramp_epochs) == (3, 0, False, 0)
    assert (ramp.epochs, ramp.loss.w_ed, ramp.loss.adaptive, ramp.loss.ramp_epochs) == (3, 2, False, 1.5)
    assert ramp.loss.w_ce is None


def test_a_bad_file_is_refused(tmp_path, monkeypatch):
    cases = [
        ("rows: 3", "rows.*list.*3"),
        ("rows: []", "one row or more"),
        ("rows: [{name: a}]\nmore: 1", "rows.*about"),
        ("rows: [{name: a}]\nbase: 3", "base.*dict.*3"),
        ("rows: [{w_fd: 1}]", "row 1.*name"),
        ("rows: [{name: a}, {name: a}]", "row 2.*'a'"),
        ("rows: [{name: a, w_xx: 1}]", "row 'a'.*w-xx"),
        ("rows: [{name: a, epochs: 0}]", "row 'a'.*--epochs.*1.*0"),
        ("rows: [{name: a, seed: 3}]", "row 'a'.*no seed.*--seed"),
        ("rows: [{name: a}]\nbase: {run_dir: b}", "row 'a'.*no run_dir.*--run-dir"),
        ("rows: [{name: a}]\nrecipe: cake", "recipe.*published.*'cake'"),
        ("rows: [{name: a}]\ndatasets: [moon]", "datasets.*'moon'.*rafdb"),
        ("!!python/object/apply:os.system ['touch owned']", "YAML"),
    ]
    bomb = "a: &a [x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in ("ab", "bc", "cd"))
    cases += [
        (f"rows: [{{name: a}}]\n{bomb}", "no anchors"),
        ("rows: [{name: a, <<: {epochs: 1}}]", "found a merge"),
        ("rows: [{name: a, 1: 2}]", "text as key.*1"),
        ("rows: [{name: a, epochs: 1, epochs: 2}]", "'epochs' twice"),
        ("rows: [{name: a, epochs: 2026-02-28}]", "found a timestamp"),
        ("rows: [{name: a, epochs: 2026-02-30}]", "found a timestamp"),
        ("rows: [{name: a, epochs: !!binary aGk=}]", "found a binary"),
        (f"rows: [{{name: a, epochs: {'9' * 5000}}}]", "YAML"),
        (f"rows: [{{name: a, seed: {2**63}}}]", "finite number below"),
        ("rows: [{name: a, w_fd: .inf}]", "finite number"),
        ("rows: [{name: a, epochs: 010}]", "decimal number, found 010, which YAML reads as 8"),
        ("rows: [{name: a, epochs: 1:30}]", "decimal number, found 1:30, which YAML reads as 90"),
        ("rows: [{name: a, epochs: [1]}]", r"row 1: epochs: expected one.*\[1\]"),
        ("rows: [{name: a}]\nbase: {epochs: {x: 1}}", "base: epochs: expected one"),
        ('rows: [{name: "a\\e[31m"}]', "row 1: .*printable characters.*x1b"),
        (f"rows: {'[' * 5000}", "at most 20 levels"),
        (f"rows: [{{name: {'a' * 101}}}]", "1 to 100 printable"),
        (f"# {'x' * 1_000_000}", "at most 1,000,000 bytes"),
        ("rows: [{name: é}]".encode("latin1"), "YAML"),
    ]
    for text, facts in cases:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"x.*{facts}") as caught:
            grid_of("x.yaml")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
        assert not (tmp_path / "owned").exists()


def test_unknown_experiments():
    cases = [("moon", "backbones, components.*'moon'"), ("no.yaml", "no.yaml")]
    for name, facts in cases:
        with pytest.raises(UserError, match=facts):
            read_experiments(name)


def test_a_written_grid_reads_back_whatever_the_command_line_says(tmp_path):
    grid = grid_of("rivals", w_ce=3, epochs=7)
    write_yaml(tmp_path / "kept.yaml", grid)
    again = grid_of(str(tmp_path / "kept.yaml"), epochs=99)
    assert (again.experiments, again.about) == (grid.experiments, grid.about)
