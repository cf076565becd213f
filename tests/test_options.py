import dataclasses

import pytest

from jaxear.config import AUTO_BATCH_SIZE, TrainConfig, from_dict, validate
from jaxear.errors import UserError
from jaxear.options import parse_train_options


def parse(*argv):
    return parse_train_options(argv)[0]


def test_defaults_are_those_of_the_dataclass():
    assert parse() == TrainConfig()


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
@pytest.mark.parametrize("separate", [True, False])
def test_hyphens_and_underscores_are_alike(flag, separate):
    assert parse(*([flag, "4"] if separate else [f"{flag}=4"])).batch_size == 4


@pytest.mark.parametrize("order", ["file first", "flag first"])
def test_flags_beat_the_file_wherever_they_stand(tmp_path, order):
    path = tmp_path / "x.yaml"
    path.write_text("epochs: 7\nlearning_rate: 1e-3\nfreeze: 6\ndecoder_channels: [16, 8]\n")
    file, flag = ["--config", str(path)], ["--epochs", "9"]
    config = parse(*(file + flag if order == "file first" else flag + file))
    assert (config.epochs, config.learning_rate, config.freeze) == (9, 1e-3, 6)
    assert config.decoder_channels == (16, 8)


def test_flags_beat_the_stages_of_a_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("stages:\n- {backbone: resnet50, epochs: 20}\n- {epochs: 40}\n")
    assert [stage["epochs"] for stage in parse("--config", str(path)).stages] == [20, 40]
    config = parse("--config", str(path), "--epochs=2")
    assert config.stages == [{"backbone": "resnet50"}, {}]
    assert config.epochs == 2
    given = parse("--config", str(path), "--epochs", "2", "--stages", "[{epochs: 3}]")
    assert given.stages == [{"epochs": 3}]


def test_options_of_the_backbone_are_yaml(tmp_path):
    config = parse("--backbone-options", "{depth: 2, pos_embed: crop}")
    assert config.backbone_options == {"depth": 2, "pos_embed": "crop"}


def test_the_batch_size_may_be_left_open_and_a_file_keeps_that(tmp_path):
    config = parse("--batch-size", "auto")
    assert config.batch_size == AUTO_BATCH_SIZE
    validate(config)
    config.save(tmp_path / "config.yaml")
    assert "batch_size: auto" in (tmp_path / "config.yaml").read_text()
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert from_dict({"batch_size": "auto"}) == config


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch-size", "0"], "batch_size"),
        (["--batch-size", "large"], "batch_size"),
        (["--dry-run", "--resume"], "--dry-run"),
        (["--epochs", "many"], "epochs"),
        (["--epoch", "3"], "epoch"),
        (["--fit", "squash"], "fit"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(argv, named):
    with pytest.raises(UserError, match=named):
        parse(*argv)


def test_unknown_keys_and_wrong_types_in_a_file_are_errors(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("epohcs: 3\n")
    with pytest.raises(UserError, match="epohcs"):
        parse("--config", str(path))
    path.write_text("epochs: soon\n")
    with pytest.raises(UserError, match="epochs"):
        parse("--config", str(path))


def test_resume_takes_the_runs_settings_and_flags_beat_them(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    dataclasses.replace(TrainConfig(), latent_dim=77, epochs=5, out=str(run)).save(
        run / "config.yaml"
    )
    config, resume, _ = parse_train_options(["--out", str(run), "--resume", "--epochs", "8"])
    assert resume
    assert (config.latent_dim, config.epochs, config.out) == (77, 8, str(run))


def test_resume_without_a_run_says_so(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        parse("--out", str(tmp_path / "none"), "--resume")


def test_saved_settings_come_back_equal(tmp_path):
    config = TrainConfig(backbone_options={"depth": 3}, freeze="all", data="x")
    config.save(tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_validate_lists_all_problems_at_once():
    config = TrainConfig(epochs=0, val_fraction=0.6, test_fraction=0.5, freeze="some")
    with pytest.raises(UserError) as error:
        validate(config)
    for word in ("epochs", "val_fraction", "freeze"):
        assert word in str(error.value)


def test_from_dict_refuses_unknown_settings():
    with pytest.raises(UserError, match="nonsense"):
        from_dict({"nonsense": 1})
