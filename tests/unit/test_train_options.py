"""jobs/train.py without a cluster: its options, the plan that they make, and what a stopped run would load."""

import pytest

from cifar_dist.cli import train
from cifar_dist.command_line import Given
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch, worker_range
from cifar_dist.recipes import recipe_config

NEEDED = ["--recipe", "quickstart_fan", "--data", "data", "--storage", "runs", "--name", "first"]


def parse(*words: str) -> Given:
    return train.COMMAND.parse([*NEEDED, *words], "train.py")


def launch_of(*words: str) -> Launch:
    return parse(*words).build(Launch)


@pytest.mark.parametrize(("text", "most", "least"), [("1", 1, None), ("16", 16, None), ("1:4", 4, 1), ("4:4", 4, 4)])
def test_workers_are_a_number_or_a_range(text, most, least):
    launch = launch_of("--workers", text)
    assert (launch.num_workers, launch.min_workers) == (most, least)


@pytest.mark.parametrize("text", ["", ":", "1:", ":4", "1:2:3", "two", "1.5", "1-4", "1:x", "1,4"])
def test_workers_that_are_neither_are_refused(text, capsys):
    with pytest.raises(ValueError, match="is neither a number of workers nor a range such as 1:4"):
        worker_range(text)
    with pytest.raises(SystemExit) as end:
        parse("--workers", text)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert f"argument --workers: {text!r} is neither a number of workers" in message
    assert message.count("\n") == 1


def test_defaults_are_the_launch_s_own():
    checks = parse().build(train.Checks)
    assert (checks.preflight_only, checks.explain_resume) == (False, False)
    expected = Launch(data="data", storage="runs", name="first", recipe="quickstart_fan", address="local")
    assert launch_of("--address", "local") == expected
    assert (expected.num_workers, expected.min_workers, expected.cluster) == (1, None, None)


def test_every_option_reaches_the_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--workers", "2:8", "--device", "gpu", "--max-failures", "7", "--collective-timeout-seconds", "30"]
    found = launch_of(*words, "--resize-seconds", "2.5", "--staging-folder", "staged", "--address", "host:1")
    assert found == Launch(
        data="data",
        storage="runs",
        name="first",
        workers="2:8",
        recipe="quickstart_fan",
        device="gpu",
        max_failures=7,
        collective_timeout_seconds=30,
        resize_seconds=2.5,
        staging_folder=str(tmp_path / "staged"),  # workers run in another folder
        address="host:1",
    )


def test_settings_override_the_recipe_s():
    given = parse("--epochs", "7", "--optim.learning-rate", "0.5")
    assert train.config_of(given, "quickstart_fan") == recipe_config("quickstart_fan", epochs=7, learning_rate=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--workers", "3:1"], "--workers must be 1 or more, or a range such as 1:4, not 3:1"),
        (["--workers", "0:2"], "not 0:2"),
        (["--resize-seconds", "nan"], "--resize-seconds must be 1 or more, not nan"),
        (["--resize-seconds", "0"], "--resize-seconds must be 1 or more"),
        (["--max-failures", "-1"], "--max-failures must be 0 or more"),
        (["--collective-timeout-seconds", "0"], "--collective-timeout-seconds must be 1 or more"),
        (["--name", "a/b"], "--name 'a/b' is no run name"),
    ],
)
def test_launch_that_cannot_be_is_an_error_of_the_user(words, message):
    with pytest.raises(UserError) as error:
        launch_of(*words)
    assert message in str(error.value)


def test_explain_resume_prints_and_does_nothing(shapes_uri, tmp_path, capsys):
    words = ["--data", shapes_uri, "--storage", str(tmp_path / "runs"), "--explain-resume", "--workers", "1:4"]
    train.run(parse(*words))
    assert capsys.readouterr().out.splitlines() == [
        f"run {tmp_path}/runs/first: 0 attempts so far, {recipe_config('quickstart_fan').loop.epochs} epochs wanted",
        "would start from the beginning: there is no checkpoint",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["--explain-resume", "--preflight-only"])
def test_what_does_not_fit_is_said_before_a_cluster_is_started(mode, shapes_uri, tmp_path):
    import ray

    words = ["--data", shapes_uri, "--storage", str(tmp_path / "runs"), "--train-images", "1000", mode]
    with pytest.raises(UserError, match="--train-images is 1000"):
        train.run(parse(*words))
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []
