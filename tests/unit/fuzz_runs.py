"""Fuzzing of what is stored of a run: checkpoints, card, attempts, log. An older state or a sentence, never another."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from checkpoint_states import same, state
from fuzzing import Group, Refused, outcome, require, tree
from mutations import (
    NAMES,
    NUMBERS,
    OTHERS,
    change_file,
    change_json,
    change_pickle,
    change_safetensors,
    change_values,
    dumped,
    put_json,
    sealed,
    sha256,
)

from cifar_dist.config import Config
from cifar_dist.data import sources, store
from cifar_dist.data.staged import DataSet
from cifar_dist.evaluate import plots
from cifar_dist.evaluate.driver import Evaluation, choose
from cifar_dist.evaluate.report import lines_of, run_report
from cifar_dist.evaluate.scores import Counts
from cifar_dist.job_settings import Launch
from cifar_dist.launch.plan import explain_resume, make_plan
from cifar_dist.recipes import recipe_config
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState, Cursor
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.log import LOG, RunLog, read_lines
from cifar_dist.run.network import expected_of
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import to_json
from cifar_dist.storage import Folder

FILES = ("meta.json", "model.safetensors", "average.safetensors", "ranks.safetensors", "optimizer.pt")
RATES = {"seconds": 2.0, "images_per_second": 10.0, "data_wait_share": 0.1, "learning_rate": 1e-3}


class Runs(Group):
    areas = ("newest", "newest", "resealed", "kept", "card", "attempts", "log", "lines", "report", "folders")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.trace = folder / "trace"  # what a forged pickle would make
        self.data = str(folder / "data")
        store.prepare(sources.shapes(60, 20), self.data)
        self.config = recipe_config("quickstart_fan")
        plan = make_plan(
            self.config, Launch(data=self.data, storage=str(self.original), name="run", recipe="quickstart_fan")
        )
        self.expect, run = expected_of(self.config, plan.data.manifest), self.original / "run"
        log = RunLog(Folder(str(run)), 0)
        put_json(run / "config.json", json.loads(to_json(plan.card)))
        attempts = Attempts(Folder(str(run)), "0123456789abcdef")
        attempts.claim(takeover=True)
        checkpoints = Checkpoints(str(run))
        self.states: dict[str, CheckpointState] = {}
        for number, (cursor, score) in enumerate([(Cursor(1, 0), 0.9), (Cursor(2, 0), 0.5), (Cursor(2, 1), None)], 1):
            log.add("step", cursor.epoch, number, step=1, train_loss=1.0, train_accuracy=0.5, **RATES)
            metrics = {"train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": None, "validation_accuracy": score}
            if score:
                log.add("epoch", cursor.epoch, number, **metrics, **RATES)
                log.add("warning", cursor.epoch, number, warning="train_chance", message="at chance")
            taken = log.take()
            log.store(taken)
            meta = {
                **{
                    **self.expect,
                    "global_step": number,
                    "metrics": {**metrics, "validation_loss": 1.0} if score else None,
                },
                **{"totals": [0.0, 0.0, 0.0], "num_averaged": 0, "config": self.config.to_dict(), "weights": None},
                **{
                    "data_uri": self.data,
                    "class_names": plan.data.manifest.class_names,
                    "world_size": 2,
                    "precision": "fp32",
                },
                **{"num_threads_per_worker": 1, "num_train": 50},
            }
            stored = checkpoints.write(cursor, 1, replace(state(number), log=taken.mark), meta)
            self.states[stored.name] = replace(state(number), log=taken.mark)
            self.mark = taken.mark
        log.close()
        shutil.rmtree(run / "tensorboard")
        self.names = sorted(self.states)
        self.is_finished = self.config.loop.epochs <= 2
        self.metas = {c.name: c.meta for c in checkpoints.all()}
        shutil.copytree(run / "checkpoints", self.outside / "checkpoints")

    def launch(self, copy: Path) -> Launch:
        return Launch(data=self.data, storage=str(copy), name="run", recipe="quickstart_fan")

    def damage(self, random: Random, folder: Path) -> None:
        """Damages a file of a checkpoint."""
        path = folder / random.choice([*FILES, "meta.json", "meta.json", "extra.txt"])
        if path.name == "meta.json" and path.is_file() and random.random() < 0.7:
            changed, said = change_json(random, path.read_bytes(), reseal=False)
            path.write_bytes(changed)
        elif path.name == "optimizer.pt" and random.random() < 0.3:
            changed, said = change_pickle(random, path.read_bytes(), self.trace)
            path.write_bytes(changed)
        elif path.is_dir() or not path.parent.is_dir():
            said = "nothing"
        else:
            said = change_file(random, path, self.outside / "outside.txt")
        self.said += f"{folder.name}: {path.name} {said}; "

    def load(self, copy: Path) -> tuple[Checkpoint, CheckpointState] | None:
        checkpoints, noted = Checkpoints(str(copy / "run")), []
        found = checkpoints.load_newest(self.expect, lambda name, fault: noted.append((name, fault)))
        for name, fault in noted:
            require(len(fault.splitlines()) <= 1, f"{name}: not one line: {fault}")
        if found and found[0].name != self.names[-1]:
            newer = [n for n in self.names if n > found[0].name and (copy / f"run/checkpoints/{n}/meta.json").exists()]
            require({n for n, fault in noted if fault} >= set(newer), "one was passed over without a word")
        return found

    def reads(self, copy: Path) -> Any:
        """Every reading of the checkpoints; returns what the newest holds, or its sentence."""
        checkpoints = Checkpoints(str(copy / "run"))
        before = tree(copy)
        found = outcome(lambda: self.load(copy))
        for read in (checkpoints.scan, checkpoints.all, checkpoints.latest, checkpoints.best):
            outcome(read)
        plan = outcome(lambda: make_plan(self.config, self.launch(copy)))
        if not isinstance(plan, Refused):
            outcome(lambda: explain_resume(plan))
        outcome(lambda: choose([str(copy / "run")], DataSet.open(self.data)))
        require(tree(copy) == before, "reading has changed the run")
        require(not self.trace.exists(), "a pickle was executed")
        return found

    def newest(self, random: Random, copy: Path) -> None:
        for name in [self.names[-1]] if random.random() < 0.6 else self.names:
            self.damage(random, copy / "run" / "checkpoints" / name)
        found = self.reads(copy)
        if found is None:
            whole = [n for n in self.names if (copy / f"run/checkpoints/{n}/meta.json").exists()]
            require(not whole, "the checkpoints were passed over")
        elif not isinstance(found, Refused):
            checkpoint, loaded = found
            require(same(loaded, self.states[checkpoint.name]), f"another state: {checkpoint.name}")
            require(dumped(checkpoint.meta) == dumped(self.metas[checkpoint.name]), "another meta.json")

    def resealed(self, random: Random, copy: Path) -> None:
        """As whoever can write the folder makes it: what is read must not be code, nor end the process."""
        for name in self.names if random.random() < 0.5 else self.names[-1:]:
            folder = copy / "run" / "checkpoints" / name
            meta = json.loads((folder / "meta.json").read_bytes())
            file = random.choice(["model.safetensors", "ranks.safetensors", "optimizer.pt", "optimizer.pt", ""])
            if file:
                content = (folder / file).read_bytes()
                if file == "optimizer.pt":
                    content, said = change_pickle(random, content, self.trace)
                else:
                    content, said = change_safetensors(random, content)
                (folder / file).write_bytes(content)
                meta["files"][file] = sha256(content)
            elif random.random() < 0.4:
                key = random.choice(["log", "files", "metrics", "totals"])
                meta[key], said = change_values(random, {"x": meta[key]})
                meta[key] = meta[key].get("x")
                said = f"{key} {said}"
            else:
                meta, said = change_values(random, meta)
            if file == "" and random.random() < 0.2:
                other = random.choice(["../x", "outside.txt", "../../../../outside/outside.txt", "extra.safetensors"])
                meta["files"] = {**self.metas[name]["files"], other: sha256(b"somebody's own")}
                said += f", names {other}"
            (folder / "meta.json").write_bytes(sealed(meta))
            self.said += f"{name}: {file} {said}; "
        found = self.reads(copy)
        if found and not isinstance(found, Refused):
            checkpoint, loaded = found
            parts = loaded.optimizer["optimizers"], loaded.optimizer["scaler"]
            require(tuple(map(type, parts)) == (list, dict), "no state of optimizers")
            RunLog(Folder(str(copy / "run")), 1, loaded.log).close()
            outcome(lambda: Config.from_dict(checkpoint.meta["config"]))

    def kept(self, random: Random, copy: Path) -> None:
        """keep() after damage: the newest and the best that are whole stay, and those that cannot be read."""
        for name in random.sample(self.names, random.choice([1, 1, 2])):
            self.damage(random, copy / "run" / "checkpoints" / name)
        checkpoints, folder = Checkpoints(str(copy / "run")), copy / "run" / "checkpoints"
        before = tree(folder)
        scanned = outcome(checkpoints.scan)
        found, damaged = ([], self.names) if isinstance(scanned, Refused) else scanned
        result = outcome(lambda: checkpoints.keep(1, 9))
        whole = [c.name for c in found]
        best = [n for n in self.names if n in whole][:1]  # the first has the best score, the next the second best
        stay = {*whole[-1:], *best, *damaged} if not isinstance(result, Refused) else set(self.names)
        after = tree(folder)
        lost = [n for n in before if n.split("/")[0] in stay and (n not in after or after[n] != before[n])]
        require(not lost, f"lost {lost}")

    def folders(self, random: Random, copy: Path) -> None:
        """Checkpoints' folders themselves: links, files, odd names."""
        folder = copy / "run" / "checkpoints"
        name = random.choice(self.names)
        match random.choice(["link", "file", "empty", "renamed", "odd"]):
            case "link":
                shutil.rmtree(folder / name)
                (folder / name).symlink_to(
                    random.choice([self.outside / "checkpoints" / name, self.outside, Path("nowhere")])
                )
            case "file":
                shutil.rmtree(folder / name)
                (folder / name).write_text("text")
            case "empty":
                shutil.rmtree(folder / name)
                (folder / name).mkdir()
            case "renamed":
                other = f"epoch-{random.choice(['0009', '00001', '99999999'])}-step-000000-attempt-0001"
                (folder / name).rename(folder / other)
            case "odd":
                (
                    folder / random.choice(["epoch-0001-step-000000-attempt-\u0661\u0661\u0661\u0661", "notes.txt"])
                ).touch()
        self.said = f"{sorted(p.name for p in folder.iterdir())}"
        found = self.reads(copy)
        if found and not isinstance(found, Refused):
            require(same(found[1], self.states[found[0].name]), "another state")
        outcome(lambda: Checkpoints(str(copy / "run")).keep(1, 9))

    def card(self, random: Random, copy: Path) -> None:
        path = copy / "run" / "config.json"
        if random.random() < 0.2:
            self.said = change_file(random, path, self.outside / "outside.txt")
        else:
            changed, self.said = change_json(random, path.read_bytes())
            path.write_bytes(changed)
        if random.random() < 0.2:
            shutil.rmtree(copy / "run" / "checkpoints")
        before = tree(copy)
        plan = outcome(lambda: make_plan(self.config, self.launch(copy)))
        if not isinstance(plan, Refused):
            finished = self.is_finished and (copy / "run" / "checkpoints").exists()
            require(plan.is_finished == finished and plan.config == self.config, "another plan")
            outcome(lambda: explain_resume(plan))
        require(tree(copy) == before, "reading has changed the run")

    def attempts(self, random: Random, copy: Path) -> None:
        folder = copy / "run" / "attempts"
        (path,) = folder.iterdir()
        if random.random() < 0.7:
            changed, self.said = change_json(random, path.read_bytes())
            path.write_bytes(changed)
        else:
            self.said = change_file(random, path, self.outside / "outside.txt")
        if random.random() < 0.3:
            number = random.choice(["000002", "9" * 40, "\u0661" * 6, "000000"])
            (folder / f"{number}-{random.choice(['fedcba9876543210', 'x'])}.json").write_bytes(b"{}")
        attempts = Attempts(Folder(str(copy / "run")), "fedcba9876543210")
        number, _ = attempts.newest()
        outcome(lambda: attempts.claim(takeover=False))
        claimed = outcome(lambda: attempts.claim(takeover=True))
        if not isinstance(claimed, Refused):
            require(claimed > number, "an older number was claimed")
            outcome(lambda: attempts.check(claimed))
        outcome(Attempts(Folder(str(copy / "run")), "0123456789abcdef").refuse)

    def damage_log(self, random: Random, copy: Path) -> None:
        path = copy / "run" / LOG
        content = path.read_bytes()
        if random.random() < 0.3:  # in parts, as on an object store
            at = random.choice([content.index(b"\n") + 1, random.randrange(1, len(content))])
            path.write_bytes(content[:at])
            part = path.with_name(f"metrics-{random.choice([at, at, at + 1, 1, 10**14]):015d}.jsonl")
            part.write_bytes(content[at:])
            path = random.choice([path, part])
        lines = path.read_bytes().splitlines()
        if random.random() < 0.6 and lines:
            at = random.randrange(len(lines))
            try:
                changed, said = change_values(random, json.loads(lines[at]))
                if random.random() < 0.3:
                    changed = random.choice([*NUMBERS, *NAMES, *OTHERS])
                lines[at] = json.dumps(changed).encode()
            except ValueError:
                said = "nothing"
            path.write_bytes(b"\n".join(lines) + b"\n")
            self.said = f"line {at}: {said}"
        else:
            self.said = change_file(random, path, self.outside / "outside.txt")

    def log(self, random: Random, copy: Path) -> None:
        """A resume: the log that the checkpoint was written with, or the old one kept aside and that said."""
        before = (copy / "run" / LOG).read_bytes()
        self.damage_log(random, copy)

        def read() -> tuple[str, bytes]:
            log = RunLog(Folder(str(copy / "run")), 3, self.mark)
            log.close()
            return log.lost, (copy / "run" / LOG).read_bytes()

        found = outcome(read)
        if not isinstance(found, Refused):
            lost, content = found
            require(content == (b"" if lost else before[: self.mark.num_bytes]), "another log")
            require(len(lost.splitlines()) <= 1, "not one line")

    def lines(self, random: Random, copy: Path) -> None:
        self.damage_log(random, copy)
        found = outcome(lambda: read_lines(Folder(str(copy / "run"))))
        if not isinstance(found, Refused):
            require(
                all(isinstance(line, dict) and isinstance(line["kind"], str) for line in found), "no lines of a log"
            )

    def report(self, random: Random, copy: Path) -> None:
        if random.random() < 0.7:
            self.damage_log(random, copy)
        else:
            path = copy / "run" / "checkpoints" / self.names[0] / "meta.json"
            meta, self.said = change_values(random, json.loads(path.read_bytes()))
            path.write_bytes(sealed(meta))
        counts = Counts(np.eye(10, dtype=np.int64), np.full(5, 10), np.zeros((15, 3), np.int64), 0)

        def read() -> None:
            data = DataSet.open(self.data)
            for run, best in choose([str(copy / "run")], data):
                made = run_report(
                    Evaluation(run=run, checkpoint=best, precision="fp32", predictions={}, counts={"test": counts}),
                    data.manifest,
                )
                to_json(made)
                if random.random() < 0.2:
                    require(re.match("<svg", plots.curves(lines_of(run))) is not None, "no picture")

        outcome(read)


def make(folder: Path) -> Group:
    return Runs(folder)
