"""Presets, YAML files and grids: which runs do they name, and whom do they refuse?"""

from __future__ import annotations

import dataclasses

import pytest

import config
from config import RECIPES, DatasetName, TrainConfig
from files import UserError
from grids import experiments
from grids.experiments import PRESETS, make_grid, read_preset


def grid_of(name, dataset_chosen=False, seeds=1, **options):
    base = config.with_options(TrainConfig(), options, "test")
    return make_grid(name, read_preset(name), base, dataset_chosen, seeds)


def losses(grid):
    return [
        (row.name, loss.w_fd, loss.w_md, loss.w_ed, loss.adaptive)
        for row in grid.experiments
        for loss in [row.settings.loss]
    ]


def test_components_switch_one_term_on_after_the_other():
    assert losses(grid_of("components")) == [
        ("CE", 0, 0, 0, True),
        ("CE + FD", 1, 0, 0, True),
        ("CE + FD + MD", 1, 1, 0, True),
        ("Ad-Corre", 1, 1, 1, True),
        ("Ad-Corre, no adaptive map", 1, 1, 1, False),
    ]


def test_paper_is_the_published_set_up_on_three_data_sets():
    preset = PRESETS["paper"]
    grid = make_grid("paper", preset, RECIPES[preset.recipe], dataset_chosen=False, num_seeds=1)
    assert [(e.settings.dataset.value, e.name) for e in grid.experiments] == [
        (dataset, row) for dataset in ("affectnet", "rafdb", "fer2013") for row in ("CE", "Ad-Corre")
    ]
    settings = grid.experiments[1].settings
    assert (settings.model.arch, settings.model.pretrained, settings.batch_size) == ("xcp", "imagenet", 50)
    assert (settings.optimizer.optimizer, settings.epochs, settings.loss.label_smoothing) == ("adam", 300, 0)


@pytest.mark.parametrize(
    ("preset", "option", "values"),
    [
        ("num-embeddings", "num_embeddings", [1, 2, 4, 7, 10]),
        ("embedding-size", "embedding_size", [32, 64, 128, 256, 512]),
        ("backbones", "arch", ["mini_xcp", "xcp", "resnet", "keras:MobileNetV2", "keras:EfficientNetB0"]),
    ],
)
def test_a_preset_varies_its_option(preset, option, values):
    rows = grid_of(preset).experiments
    assert [config.options_by_name(row.settings)[option] for row in rows] == values


def test_rivals_add_one_other_loss_each_to_cross_entropy():
    rows = {e.name: e.settings.loss for e in grid_of("rivals").experiments}
    assert [(name, loss.w_center, loss.w_supcon, loss.w_triplet, loss.w_fd) for name, loss in rows.items()] == [
        ("CE", 0, 0, 0, 0),
        ("CE + center", 1, 0, 0, 0),
        ("CE + supervised contrastive", 0, 1, 0, 0),
        ("CE + triplet, semi-hard", 0, 0, 1, 0),
        ("Ad-Corre", 0, 0, 0, 1),
    ]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_be_trained(name):
    preset = PRESETS[name]
    for experiment in make_grid(name, preset, RECIPES[preset.recipe], False, 1).experiments:
        config.check(experiment.settings)
    assert preset.about.endswith(("?", "."))


def test_rows_win_over_the_command_line_and_keep_the_rest_of_it():
    rows = grid_of("num-embeddings", epochs=5, num_embeddings=3, w_fd=0.5).experiments
    assert [row.settings.model.num_embeddings for row in rows] == [1, 2, 4, 7, 10]
    assert {(row.settings.epochs, row.settings.loss.w_fd) for row in rows} == {(5, 0.5)}


def test_a_data_set_of_the_command_line_replaces_those_of_the_preset():
    assert {e.settings.dataset for e in grid_of("components").experiments} == {DatasetName.synthetic}
    chosen = grid_of("paper", dataset_chosen=True, dataset="rafdb").experiments
    assert [e.settings.dataset for e in chosen] == [DatasetName.rafdb] * 2


def test_runs_come_seed_by_seed():
    grid = grid_of("loss-weights", seeds=2, seed=5)
    assert grid.seeds == (5, 6)
    runs = grid.runs()
    assert [seed for _, seed in runs] == [5] * 6 + [6] * 6
    assert [e.name for e, _ in runs[:6]] == [e.name for e, _ in runs[6:]]
    assert runs[0][0].with_seed(6) == dataclasses.replace(runs[0][0].settings, seed=6)


YAML = """
about: Does a ramp help?
base: {epochs: 3, w_ed: 0, adaptive: false}
rows:
  - {name: no ramp}
  - {name: ramp, ramp_epochs: 1.5, w_ed: 2, w_ce: null}
"""


def test_a_yaml_file(tmp_path):
    path = tmp_path / "ramp.yaml"
    path.write_text(YAML)
    grid = grid_of(str(path))
    assert (grid.name, grid.about) == ("ramp", "Does a ramp help?")
    plain, ramp = (e.settings for e in grid.experiments)
    assert (plain.epochs, plain.loss.w_ed, plain.loss.adaptive, plain.loss.ramp_epochs) == (3, 0, False, 0)
    assert (ramp.epochs, ramp.loss.w_ed, ramp.loss.adaptive, ramp.loss.ramp_epochs) == (3, 2, False, 1.5)
    assert ramp.loss.w_ce is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: 3", "expected the entries rows"),
        ("rows: []", "expected one row or more"),
        ("rows: [{name: a}]\nmore: 1", "expected the entries rows"),
        ("rows: [{w_fd: 1}]", "row 1: expected a name"),
        ("rows: [{name: a}, {name: a}]", "row 2: the name 'a' stands twice"),
        ("rows: [{name: a, w_xx: 1}]", "row 'a': cannot use the options {'w_xx': 1}.*w-xx"),
        ("rows: [{name: a, epochs: many}]", "row 'a': cannot use the options {'epochs': 'many'}"),
        ("rows: [{name: a, epochs: 0}]", "row 'a': --epochs: expected 1 to .*, received 0"),
        ("rows: [{name: a}]\nrecipe: cake", "recipe: expected one of default, published, found 'cake'"),
        ("rows: [{name: a}]\ndatasets: [moon]", "datasets: 'moon'"),
        ("rows: [", "expected YAML"),
        ("!!python/object/apply:os.system ['touch owned']", "expected YAML"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        grid_of(str(path))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("name", "message"), [("moon", "one of paper, components"), ("no.yaml", "no such file")])
def test_unknown_experiments(name, message):
    with pytest.raises(UserError, match=message):
        read_preset(name)


def test_no_seed_is_no_grid():
    with pytest.raises(UserError, match="--seeds: expected 1 or more, received 0"):
        grid_of("components", seeds=0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_written_grid_reads_back_whatever_the_command_line_says(tmp_path, name):
    grid = grid_of(name, w_ce=3, epochs=7)
    experiments.write_yaml(tmp_path / "kept.yaml", grid)
    again = grid_of(str(tmp_path / "kept.yaml"), epochs=99)
    assert again.experiments == grid.experiments
    assert again.about == grid.about
