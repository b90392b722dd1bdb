"""Every option of a training run, typed, with its default, unit and check; and the command line made of them."""

import argparse
import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cifar_dist.environment import cluster_address, ray_address
from cifar_dist.errors import UserError
from cifar_dist.uris import absolute_uri, join_uri


def option(
    default: Any, help: str, choices: tuple = (), minimum: float | None = None, maximum: float | None = None
) -> Any:
    """A dataclass field that carries its help text and its check."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum})


def nearest(word: str, valid: Any) -> str:
    """' (did you mean X?)' for the valid word closest to `word`, or '' if none is close."""
    close = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


class Section:
    """Base of the sections: checks type, choices and range of every field when it is built."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, f.name), f.name.replace("_", "-")
            kind = getattr(f.type, "__name__", f.type)
            choices, low, high = (f.metadata[k] for k in ("choices", "minimum", "maximum"))
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise UserError(f"--{name} takes a value of type {kind}, not {value!r}")
            if choices and value not in choices:
                raise UserError(f"--{name} is one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}")
            if f.type is float and not math.isfinite(value):
                raise UserError(f"--{name} takes a value that is finite, not {value}")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                least, most = (f"{b:g}" if isinstance(b, float) else b for b in (low, high))
                bounds = f"from {least} to {most}" if high is not None else f"of {least} or more"
                raise UserError(f"--{name} takes a value {bounds}, not {value}")


@dataclass(frozen=True)
class ModelConfig(Section):
    model: str = option("fan", "the network", choices=("fan", "resnet50v2"))
    finetune: bool = option(False, "train the ResNet base too (default: frozen, in inference mode)")
    batchnorm_momentum: float = option(
        0.99, "share of the old moving statistics kept at each step, as Keras counts it", minimum=0, maximum=1
    )
    weights: str = option("", "Keras weights to start from: a .h5, .weights.h5 or .keras file (empty: random)")


@dataclass(frozen=True)
class DataConfig(Section):
    image_size: int = option(32, "side in pixels to which images are resized", minimum=8, maximum=4096)
    input_range: str = option("0..1", "range of the model's input", choices=("0..1", "-1..1", "0..255"))
    flips: str = option(
        "none", "how training images are flipped, with probability 1/2", choices=("none", "horizontal", "both")
    )
    crop_padding: int = option(
        0, "pixels by which the crop of a padded training image is shifted at most (0: no crop)", minimum=0
    )
    cutout_size: int = option(0, "side in pixels of the square cut out of a training image (0: none)", minimum=0)
    validation_fraction: float = option(
        0.1, "share of the train split, per class, held out for validation", minimum=0.0001, maximum=0.9
    )
    split_seed: int = option(0, "seed of the validation split: the same rows whatever the run's --seed", minimum=0)
    train_images: int = option(0, "train on this many images, evenly drawn by class (0: all)", minimum=0)
    cache: str = option(
        "auto", "decode each epoch, once, or once if it fits the budget", choices=("auto", "decoded", "encoded")
    )
    cache_budget_mib: int = option(2048, "largest decoded set that --cache auto keeps, in MiB", minimum=0)
    features: str = option(
        "computed",
        "frozen resnet50v2: cached keeps the base's output per image and flip on the node's disk",
        choices=("computed", "cached"),
    )
    synthetic_data: bool = option(False, "train on one random batch again and again, so that input costs nothing")
    dali_threads: int = option(0, "DALI's CPU threads per worker (0: as many as the worker has cores)", minimum=0)


@dataclass(frozen=True)
class OptimConfig(Section):
    optimizer: str = option("adam", "adam has Keras's epsilon rule", choices=("adam", "adamw", "sgd", "muon"))
    learning_rate: float = option(1e-3, "peak learning rate", minimum=0)
    schedule: str = option("constant", "learning rate over the run", choices=("constant", "cosine", "one-cycle"))
    warmup_fraction: float = option(0.0, "share of the steps spent rising to the peak", minimum=0, maximum=0.9)
    weight_decay: float = option(
        0.0, "weight decay (decoupled in adamw and muon), of biases and BatchNorm's scales too", minimum=0
    )
    decay_bias_and_norm: bool = option(True, "also decay biases and BatchNorm's scales and shifts")
    momentum: float = option(0.9, "momentum of sgd and muon (Nesterov)", minimum=0, maximum=0.9999)
    muon_learning_rate: float = option(
        0.02, "muon: peak learning rate of the convolutions; the rest takes adamw's", minimum=0
    )
    beta1: float = option(0.9, "Adam's decay of the first moment", minimum=0, maximum=0.9999)
    beta2: float = option(0.999, "Adam's decay of the second moment", minimum=0, maximum=0.99999)
    epsilon: float = option(1e-7, "Adam's epsilon", minimum=0)
    clip_norm: float = option(0.0, "largest global gradient norm (0: no clipping)", minimum=0)
    label_smoothing: float = option(0.0, "label smoothing of the training loss", minimum=0, maximum=0.9)
    ema_decay: float = option(
        0.0, "decay per step of the weight average that is evaluated (0: none)", minimum=0, maximum=0.99999
    )


@dataclass(frozen=True)
class LoopConfig(Section):
    epochs: int = option(30, "passes over the training images", minimum=1)
    global_batch_size: int = option(64, "images per optimizer step, over all workers", minimum=1)
    accumulation_steps: int = option(1, "micro-batches that a worker splits its part of a step into", minimum=1)
    seed: int = option(0, "seed of weights, order, flips and dropout", minimum=0, maximum=2**31 - 1)
    precision: str = option(
        "auto",
        "auto: bf16 where GPU or CPU compute in it, else fp16 on GPU, fp32 on CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    memory_format: str = option(
        "auto",
        "auto: channels_last on GPU, in bf16, and for resnet50v2 on CPU",
        choices=("auto", "contiguous", "channels_last"),
    )
    compile: str = option("auto", "torch.compile (auto: on GPU only)", choices=("auto", "on", "off"))
    recalibrate_batches: int = option(
        0, "training batches that re-estimate BatchNorm's statistics before each validation (0: none)", minimum=0
    )
    gradient_dtype: str = option("fp32", "in which workers exchange gradients", choices=("fp32", "bf16"))
    deterministic: bool = option(False, "deterministic algorithms only (CPU runs are deterministic anyway)")
    record_samples: bool = option(False, "put every step's ids and flips into metrics.jsonl: an audit, for small runs")
    log_every_steps: int = option(20, "optimizer steps between metric lines", minimum=1)
    chance_warning_steps: int = option(
        500, "steps after which training at chance is warned of (0: never, nor of lagging validation)", minimum=0
    )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    checkpoint_every_steps: int = option(
        0, "optimizer steps between checkpoints inside an epoch (0: by time and at epoch ends only)", minimum=0
    )
    checkpoint_every_seconds: float = option(
        300.0, "seconds between checkpoints inside an epoch (0: none by time)", minimum=0
    )
    storage_retry_seconds: float = option(
        60.0, "how long a write or read of checkpoints is tried again while storage is away", minimum=0
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept; the best one is kept beside them", minimum=1)


@dataclass(frozen=True)
class Config:
    """A run's settings. Field names are unique over the sections, so `--epochs` is short for `--loop.epochs`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        size = self.data.image_size
        if self.model.model == "fan" and size != 32:
            raise UserError(f"model fan flattens its last feature map, so --image-size must be 32, not {size}")
        if self.model.model == "fan" and self.model.finetune:
            raise UserError("--finetune is for resnet50v2: fan has no frozen base")
        data = self.data
        if data.features == "cached":
            if self.model.model != "resnet50v2" or self.model.finetune:
                raise UserError("--features cached is for resnet50v2 with a frozen base; leave it out for others")
            if data.crop_padding or data.cutout_size or data.synthetic_data:
                raise UserError(
                    "--features cached keeps one output per image and flip: it does not go with --crop-padding, "
                    "--cutout-size or --synthetic-data"
                )
        if self.data.crop_padding >= size or self.data.cutout_size >= size:
            raise UserError(f"--crop-padding and --cutout-size must be less than --image-size {size}")
        if self.model.model == "resnet50v2" and size < 96:
            raise UserError(f"model resnet50v2 needs an --image-size of 96 or more, not {size}")

    def replace(self, **values: Any) -> "Config":
        """A copy with fields set by their short names, checked again."""
        sections = {}
        for f in dataclasses.fields(self):
            section = getattr(self, f.name)
            mine = {k: values.pop(k) for k in list(values) if k in section.__dataclass_fields__}
            sections[f.name] = dataclasses.replace(section, **mine)
        if values:
            name = next(iter(values))
            raise UserError(f"unknown setting {name!r}{nearest(name, option_fields())}")
        return Config(**sections)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Config":
        """The inverse of to_dict; a setting that this version does not know is an error."""
        return Config().replace(**{k: v for section in values.values() for k, v in section.items()})


def option_fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """Short name -> (section name, field), for every option of Config."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {f.name: (s, f) for s, cls in sections.items() for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


# A run may be continued with other values of these: more epochs, and what does not change what is learned.
FREE_ON_RESUME = {
    *("epochs", "weights", "cache", "cache_budget_mib", "dali_threads", "log_every_steps", "chance_warning_steps"),
    *("features", "record_samples", "checkpoint_every_steps", "checkpoint_every_seconds", "storage_retry_seconds"),
    "keep_checkpoints",
}


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates and names the nearest valid option or value."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self._negative_number_matcher = re.compile(r"-\d")  # -1..1 and -1e-3 are values, not options
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].split("=")[0]
            self.error(f"unknown option {unknown[0]}{nearest(word, options)}; --help lists them all")
        return result

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(action.choices)}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1", "on")


def worker_range(text: str) -> tuple[int, int | None]:
    """(most, least or None): '4' or '1:4'."""
    try:
        low, colon, high = text.partition(":")
        return (int(high), int(low)) if colon else (int(low), None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of workers nor a range such as 1:4") from None


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--SECTION.NAME` and its short form `--NAME` for every option of Config."""
    groups = {f.name: parser.add_argument_group(f"{f.name} settings") for f in dataclasses.fields(Config)}
    for name, (section, f) in option_fields().items():
        flag = name.replace("_", "-")
        flags = [f"--{flag}", f"--{section}.{flag}"] + [f"--{section}.{name}"] * (flag != name)
        kind: dict[str, Any] = {"type": f.type, "choices": f.metadata["choices"] or None, "metavar": "VALUE"}
        if f.type is bool:
            kind = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif f.metadata["choices"]:
            kind["metavar"] = "|".join(f.metadata["choices"])
        text = f"{f.metadata['help']} (default {f.default})".replace("%", "%%")
        groups[section].add_argument(*flags, dest=name, default=None, help=text, **kind)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Where a job runs: devices, the nodes' folder, the cluster."""
    where, cluster = "local folder for staged data", "Ray cluster (default: RAY_ADDRESS, else one is started here)"
    devices = "auto: GPUs if the cluster has any"
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help=devices)
    parser.add_argument("--staging-folder", type=os.path.abspath, help=f"{where} (default: in the temporary folder)")
    parser.add_argument("--address", default=ray_address(), type=cluster_address, help=cluster)


def config_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by short name."""
    return {name: value for name in option_fields() if (value := getattr(args, name)) is not None}


@dataclass(frozen=True)
class Launch:
    """Where and how a run is launched: workers, storage and limits. Nothing here changes what is learned."""

    data_uri: str
    storage_uri: str
    name: str
    num_workers: int = 1  # at most, where min_workers is given
    min_workers: int | None = None  # None: exactly num_workers
    recipe: str = ""
    device: str = "auto"  # auto, cpu or gpu
    max_failures: int = 3
    collective_timeout_seconds: int = 120
    resize_seconds: float = 60.0  # between looks at the cluster for more workers, where min_workers is given
    staging_folder: str | None = None
    address: str | None = None  # of a Ray cluster; None starts one on this machine
    profile: bool = False  # rank 0 writes a trace of a few steps

    def __post_init__(self) -> None:
        if self.num_workers < 1 or (self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers):
            given = self.num_workers if self.min_workers is None else f"{self.min_workers}:{self.num_workers}"
            raise UserError(f"--workers must be 1 or more, or a range such as 1:4, not {given}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(
                f"--name {self.name!r} is no run name: up to 100 letters, digits, dots, dashes and underscores, "
                "beginning with a letter or digit; a folder goes into --storage"
            )
        limits = {
            "collective-timeout-seconds": (self.collective_timeout_seconds, 1),
            "resize-seconds": (self.resize_seconds, 1),
        }
        for name, (value, least) in {"max-failures": (self.max_failures, 0), **limits}.items():
            if not least <= value < math.inf:
                raise UserError(f"--{name} must be {least} or more, not {value}")

    @property
    def run_uri(self) -> str:
        return join_uri(absolute_uri(self.storage_uri), self.name)
