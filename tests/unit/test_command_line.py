"""Help that teaches, config files, and the ways to call a job."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.cli import JOBS, module_of
from cifar_dist.command_line import Command, Given
from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.recipes import RECIPES, recipe_config
from cifar_dist.sealed_json import seal, to_json

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Command] = {job: module_of(job).COMMAND for job in JOBS}
TRAIN = COMMANDS["train"]
NEEDED = ["--recipe", "quickstart_fan", "--data", "data", "--storage", "runs", "--name", "first"]


def refusal(*words: str, command: Command = TRAIN) -> str:
    with pytest.raises(UserError) as error:
        command.parse(list(words), "train.py")
    assert "\n" not in str(error.value)
    return str(error.value)


def printed(capsys: pytest.CaptureFixture[str], *words: str, job: str = "train") -> str:
    with pytest.raises(SystemExit) as end:
        COMMANDS[job].parse(list(words), f"{job}.py")
    assert end.value.code == 0
    return capsys.readouterr().out


# Help.


def flags(text: str) -> list[str]:
    """The options that a help text lists."""
    return re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("job", JOBS)
def test_all_help_lists_every_setting_once_and_short_help_some(job, capsys):
    every, short = (printed(capsys, words, job=job) for words in ("--help-all", "--help"))
    wanted = ["--" + name.replace("_", "-") for name in COMMANDS[job].settings()]
    assert set(flags(every)) == {*wanted, "--help", "--help-all", "--config", "--print-config", "--debug"}
    assert len(flags(every)) == len(set(flags(every)))
    assert set(flags(short)) <= set(flags(every))
    assert {f"--{name}" for name in COMMANDS[job].required()} <= set(flags(short))
    assert "--help-all" in short.splitlines()[-1]


def test_short_help_of_train_has_recipes_first_an_example_and_fits_a_screen(capsys):
    text = printed(capsys, "--help")
    assert len(text.splitlines()) < 60
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in RECIPES)
    assert text.index("recipes:") < text.index("  --recipe NAME  ")
    assert "python jobs/train.py --recipe quickstart_fan" in text
    assert "--section" not in text
    assert "--loop.epochs" not in text


@pytest.mark.parametrize("job", ["", *JOBS])
def test_help_waits_for_neither_torch_nor_ray(job):
    heavy = {"torch", "ray", "nvidia.dali", "pyarrow", "matplotlib", "numpy"}
    code = (
        f"import sys; sys.argv = ['cifar-dist', *{[job, '--help'] if job else ['--help']}]\n"
        "from cifar_dist.cli import main\n"
        "try:\n    main()\n"
        f"except SystemExit as end:\n    print(end.code, sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_plan_waits_for_neither_torch_nor_ray():
    """A mistake in settings, data or the stored run is answered before either is imported."""
    code = "import sys, cifar_dist.launch.plan; print(sorted({'torch', 'ray', 'nvidia.dali'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# Spellings.


def test_lr_is_the_learning_rate():
    for word in ("--lr", "--learning-rate", "--optim.learning-rate", "--optim.lr"):
        assert TRAIN.parse([*NEEDED, word, "0.5"], "train.py").values["learning_rate"] == 0.5


def test_lr_is_the_learning_rate_in_a_file(tmp_path):
    for text in ("lr = 0.5", "[optim]\nlr = 0.5"):
        file = written(tmp_path, text)
        assert TRAIN.parse([*NEEDED, "--config", file], "train.py").values["learning_rate"] == 0.5


def test_a_required_setting_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        TRAIN.parse(["--recipe", "deck_fan", "--data", "d"], "train.py")
    assert end.value.code == 2
    assert capsys.readouterr().err == "train.py: the following arguments are required: --storage, --name\n"


# Config files.


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def config_of(given: Given) -> Config:
    return module_of("train").config_of(given, given.values["recipe"])


def test_a_toml_file_gives_settings_in_tables_and_outside_of_them(tmp_path):
    text = 'recipe = "deck_fan"\ndata = "d"\nstorage = "s"\nname = "n"\nepochs = 7\n[launch]\nworkers = 4\n'
    text += "[optim]\nlearning-rate = 1\n"
    given = TRAIN.parse(["--config", written(tmp_path, text)], "train.py")
    assert given.values["workers"] == "4"
    assert config_of(given) == recipe_config("deck_fan", epochs=7, learning_rate=1.0)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = written(tmp_path, json.dumps({"loop": {"epochs": 7, "seed": 3}, "recipe": "deck_fan"}), "mine.json")
    given = TRAIN.parse([*NEEDED, "--config", file, "--epochs", "9"], "train.py")
    assert given.values["recipe"] == "quickstart_fan"
    assert config_of(given) == recipe_config("quickstart_fan", epochs=9, seed=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epcohs = 3", "unknown setting 'epcohs' (did you mean epochs?)"),
        ("[loop]\nepcohs = 3", "unknown setting 'epcohs' in the table 'loop' (did you mean epochs?)"),
        ("[optim]\nepochs = 3", "unknown setting 'epochs' in the table 'optim'"),
        ("[lop]\nepochs = 3", "unknown table 'lop' (did you mean loop?)"),
        ('epochs = "3"', "--epochs takes a value of type int, not '3'"),
        ("epochs = true", "--epochs takes a value of type int, not True"),
        ("epochs = 0", "--epochs takes a value of 1 or more, not 0"),
        ("learning_rate = nan", "--learning-rate takes a value that is finite, not nan"),
        ('optimizer = "adm"', "--optimizer is one of adam, adamw, sgd, muon, not 'adm' (did you mean adam?)"),
        ("workers = 1.5", "1.5 is neither a number of workers nor a range such as 1:4"),
        ("epochs = [3]", "--epochs takes a value of type int, not [3]"),
        ("epochs = 3\n[loop]\nepochs = 4", "sets epochs twice"),
        ("[loop]\nlog-every-steps = 3\nlog_every_steps = 4", "sets log_every_steps twice"),
        ("[launch]\nstaging_folder = 5", "--staging-folder takes a value of type str, not 5"),
        ('{"loop": {"epochs": 3, "epochs": 4}}', "it has the key 'epochs' twice"),
        ("epochs: 3", "cannot be read as TOML or JSON"),
        ('{"epochs": NaN}', "cannot be read as TOML or JSON"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence_with_its_name(text, message, tmp_path):
    file = written(tmp_path, text)
    said = refusal(*NEEDED, "--config", file)
    assert said.startswith(f"--config {file}")
    assert message in said


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "cannot be read" in refusal("--config", "")
    assert f"--config {tmp_path}/none cannot be read" in refusal("--config", f"{tmp_path}/none")


def card(**changes) -> dict:
    config = recipe_config("quickstart_fan", epochs=5, seed=11)
    return {
        "config": config.to_dict(),
        "manifest_sha256": "abc",
        "weights": None,
        "recipe": "quickstart_fan",
        "data_uri": "data",
        "num_workers": 2,
        "chosen_where_the_deck_is_silent": {},
        **changes,
    }


def test_the_card_of_a_run_gives_its_settings_and_recipe(tmp_path):
    file = written(tmp_path, to_json(seal(card())).decode(), "config.json")
    words = ["--config", file, "--data", "d", "--storage", "s", "--name", "again", "--batchnorm-momentum", "0.5"]
    given = TRAIN.parse(words, "train.py")
    assert given.values["recipe"] == "quickstart_fan"
    assert config_of(given) == recipe_config("quickstart_fan", epochs=5, seed=11, batchnorm_momentum=0.5)


def test_a_card_gives_a_job_what_it_has(tmp_path):
    file = written(tmp_path, to_json(seal(card())).decode(), "config.json")
    given = COMMANDS["pipeline"].parse(["--out", "o", "--config", file], "pipeline.py")
    assert (given.values["epochs"], given.values["seed"], "recipe" in given.values) == (5, 11, False)
    for job in ("prepare", "evaluate", "weights"):
        assert "this job has no settings of training" in refusal("--config", file, command=COMMANDS[job])


def test_a_card_that_was_changed_is_refused(tmp_path):
    values = seal(card())
    values["config"]["loop"]["epochs"] = 50
    file = written(tmp_path, json.dumps(values), "config.json")
    assert "does not match its own checksum; copy its settings into a file of yours" in refusal("--config", file)


# --print-config.


def test_what_is_printed_is_read_back(tmp_path, capsys):
    words = [*NEEDED, "--workers", "1:3", "--epochs", "4", "--lr", "0.25", "--flips", "both", "--profile"]
    file = written(tmp_path, printed(capsys, *words, "--print-config"), "printed.json")
    one, other = TRAIN.parse(words, "train.py"), TRAIN.parse(["--config", file], "train.py")
    launch = module_of("train").Launch
    assert one.build(launch) == other.build(launch)
    assert config_of(one) == config_of(other)
    assert set(other.values) >= set(Config().values())
    assert printed(capsys, "--config", file, "--print-config") == Path(file).read_text()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("prepare", ["--source", "shapes", "--num-train", "40"]),
        ("evaluate", ["--runs", "a", "b", "--splits", "test"]),
        ("pipeline", ["--recipes", "deck_fan", "--epochs", "2"]),
        ("weights", []),
    ],
)
def test_every_job_prints_what_it_reads(job, words, tmp_path, capsys):
    """Settings that are required may be missing. What a recipe decides is left out of the pipeline's."""
    text = printed(capsys, *words, "--print-config", job=job)
    file = written(tmp_path, text)
    assert printed(capsys, "--config", file, "--print-config", job=job) == text
    assert {key for table in json.loads(text).values() for key in table} <= set(COMMANDS[job].settings())


def test_settings_without_a_recipe_are_not_printed():
    assert "--print-config needs a --recipe" in refusal("--print-config")
    assert "unknown recipe 'dek_fan'" in refusal("--print-config", "--recipe", "dek_fan")


@pytest.mark.parametrize(
    ("job", "words", "message"),
    [
        ("train", "--recipe quickstart_fan --workers 0", "--workers must be 1 or more"),
        ("train", "--recipe quickstart_fan --name ///", "is no run name"),
        ("train", "--recipe quickstart_fan --image-size 64", "--image-size must be 32"),
        ("prepare", "--source shapes --path /x", "reads no --path"),
        ("prepare", "--source shapes --test-fraction 5", "--test-fraction must lie between 0 and 1"),
        ("pipeline", "--recipes nosuch", "unknown recipe 'nosuch'"),
        ("pipeline", "--recipes deck_fan --image-size 64", "--image-size must be 32"),
        ("evaluate", "--shards -3", "--shards must be 1 or more"),
    ],
)
def test_what_a_job_would_refuse_is_not_printed(job, words, message):
    assert message in refusal(*words.split(), "--print-config", command=COMMANDS[job])


# Ways to call a job.

WAYS = {
    "the console script": [str(Path(sys.executable).with_name("cifar-dist")), "train"],
    "the package": [sys.executable, "-m", "cifar_dist", "train"],
    "the file": [sys.executable, str(ROOT / "jobs" / "train.py")],
    "the module": [sys.executable, "-m", "jobs.train"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_can_be_called_in_each_way_from_another_folder(way, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if way == "the module" else dict(os.environ)
    command = [*WAYS[way], "--recipe", "dek_fan", *NEEDED[2:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown recipe 'dek_fan' (did you mean deck_fan?)")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "usage: cifar-dist JOB"),
        (["--help"], 0, "  prepare "),
        (["--version"], 0, "0."),
        (["trian"], 2, "unknown job 'trian' (did you mean train?)"),
        (["train", "--epcohs", "3"], 2, "cifar-dist train: unknown option --epcohs (did you mean --epochs?)"),
    ],
)
def test_the_console_script_lists_its_jobs_and_names_the_nearest(words, code, said):
    done = subprocess.run([*WAYS["the package"][:3], *words], check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)
