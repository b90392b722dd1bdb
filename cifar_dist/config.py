"""Declares the settings of training: type, default, range, choices, unit and help."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cifar_dist.errors import UserError
from cifar_dist.models.spec import MODELS
from cifar_dist.options import Section, nearest, option


class TrainingSection(Section):
    """Base of the sections whose settings decide what a run learns and how fast."""

    range_words: ClassVar[tuple[str, str]] = "takes a value", "of "
    by_recipe = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TrainingSection):
    table, heading = "model", "network"

    model: str = option("fan", help="the network", choices=tuple(MODELS), common=True)
    finetune: bool = option(False, help="train the ResNet base too (default: frozen, in inference mode)")
    batchnorm_momentum: float = option(
        0.99,
        help="share of the old moving statistics that BatchNorm keeps at each step, as in Keras",
        minimum=0,
        maximum=1,
    )
    weights: str = option(
        "",
        help="Keras weights to start from: a .h5, .weights.h5 or .keras file (empty: random)",
        metavar="URI",
        common=True,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(TrainingSection):
    table, heading = "data", "input"

    image_size: int = option(32, help="side in pixels to which images are resized", minimum=8, maximum=4096)
    resize: str = option(
        "squash",
        help="how images become square: squash: both sides resized; fit: the whole image, on grey; crop: its centre",
        choices=("squash", "fit", "crop"),
    )
    antialias: bool = option(False, help="smooth images where they shrink, with a triangular filter")
    input_range: str = option("0..1", help="range of the model's input", choices=("0..1", "-1..1", "0..255"))
    flips: str = option(
        "none", help="how training images are flipped, with probability 1/2", choices=("none", "horizontal", "both")
    )
    crop_padding: int = option(
        0, help="most pixels by which a training image is shifted, by a crop after padding (0: no crop)", minimum=0
    )
    cutout_size: int = option(0, help="side in pixels of the square cut out of a training image (0: none)", minimum=0)
    validation_fraction: float = option(
        0.1,
        help="share of each class of train that is held out for validation, if the data set has no validation split",
        minimum=0.0001,
        maximum=0.9,
    )
    split_seed: int = option(
        0, help="seed that draws the validation images and --train-images, which do not depend on --seed", minimum=0
    )
    train_images: int = option(0, help="number of training images, drawn evenly by class (0: all)", minimum=0)
    cache: str = option(
        "auto",
        help="encoded: decode in every epoch; decoded: once; auto: once if it fits --cache-budget-mib",
        choices=("auto", "decoded", "encoded"),
        may_change=True,
    )
    cache_budget_mib: int = option(
        2048, help="largest decoded split that --cache auto keeps, in MiB", minimum=0, may_change=True
    )
    features: str = option(
        "computed",
        help="frozen resnet50v2: cached keeps the base's output per image and flip, on the GPU or on the node's disk",
        choices=("computed", "cached"),
        may_change=True,
    )
    synthetic_data: bool = option(False, help="train on one random batch, to measure compute alone")
    dali_threads: int = option(
        0, help="DALI's CPU threads per worker (0: as many as the worker has cores)", minimum=0, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(TrainingSection):
    table, heading = "optim", "optimizer"

    optimizer: str = option(
        "adam", help="optimizer; adam follows Keras's rule for epsilon", choices=("adam", "adamw", "sgd", "muon")
    )
    learning_rate: float = option(1e-3, help="peak learning rate", aliases=("lr",), common=True, minimum=0)
    schedule: str = option(
        "constant", help="course of the learning rate over the run", choices=("constant", "cosine", "one-cycle")
    )
    warmup_fraction: float = option(
        0.0, help="share of the steps in which the learning rate rises to its peak", minimum=0, maximum=0.9
    )
    weight_decay: float = option(0.0, help="weight decay, decoupled in adamw and muon", minimum=0)
    decay_bias_and_norm: bool = option(
        True, help="apply the weight decay to biases and to BatchNorm's scales and shifts too"
    )
    momentum: float = option(0.9, help="momentum of sgd and muon (Nesterov)", minimum=0, maximum=0.9999)
    muon_learning_rate: float = option(
        0.02, help="muon: peak learning rate of the convolutions; adamw at --learning-rate trains the rest", minimum=0
    )
    beta1: float = option(0.9, help="Adam's decay of the first moment", minimum=0, maximum=0.9999)
    beta2: float = option(0.999, help="Adam's decay of the second moment", minimum=0, maximum=0.99999)
    epsilon: float = option(1e-7, help="Adam's epsilon", minimum=0)
    clip_norm: float = option(0.0, help="largest global gradient norm (0: no clipping)", minimum=0)
    label_smoothing: float = option(0.0, help="label smoothing of the training loss", minimum=0, maximum=0.9)
    ema_decay: float = option(
        0.0,
        help="decay per step of the average of the weights, which is then evaluated (0: no average)",
        minimum=0,
        maximum=0.99999,
    )


@dataclass(frozen=True, kw_only=True)
class LoopConfig(TrainingSection):
    table, heading = "loop", "training"

    epochs: int = option(30, help="passes over the training images", common=True, minimum=1, may_change=True)
    global_batch_size: int = option(
        64, help="images per optimizer step, of all workers together", common=True, minimum=1
    )
    accumulation_steps: int = option(1, help="micro-batches into which a worker splits its part of a step", minimum=1)
    seed: int = option(0, help="seed of weights, order, flips and dropout", common=True, minimum=0, maximum=2**31 - 1)
    precision: str = option(
        "auto",
        help="auto: bf16 where the processor has it, else fp16 on GPUs and fp32 on CPUs",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    memory_format: str = option(
        "auto",
        help="auto: channels_last on GPUs, in bf16, and for resnet50v2 on CPUs",
        choices=("auto", "contiguous", "channels_last"),
    )
    compile: str = option(
        "auto", help="use torch.compile for full batches (auto: on GPUs only)", choices=("auto", "on", "off")
    )
    cuda_graph: str = option(
        "auto",
        help="auto: on a GPU, a worker that trains alone runs a step as one CUDA graph, but for muon",
        choices=("auto", "off"),
        may_change=True,
    )
    recalibrate_batches: int = option(
        0,
        help="training batches from which BatchNorm's statistics are estimated anew before each validation (0: none)",
        minimum=0,
    )
    gradient_dtype: str = option(
        "fp32", help="number format in which workers exchange gradients", choices=("fp32", "bf16")
    )
    deterministic: bool = option(False, help="use deterministic algorithms only (runs on CPUs always do)")
    record_samples: bool = option(
        False, help="write the ids and flips of every step into metrics.jsonl, to audit a small run", may_change=True
    )
    log_every_steps: int = option(20, help="optimizer steps between metric lines", minimum=1, may_change=True)
    chance_warning_steps: int = option(
        500,
        help="warn if training accuracy is still at chance after this many steps (0: no warning, nor of validation)",
        minimum=0,
        may_change=True,
    )

    def compiles(self, *, gpu: bool) -> bool:
        """Whether full batches run through torch.compile."""
        return self.compile == "on" or (self.compile == "auto" and gpu)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(TrainingSection):
    table, heading = "checkpoint", "checkpoints"

    checkpoint_every_steps: int = option(
        0, help="optimizer steps between checkpoints (0: by time only)", minimum=0, may_change=True
    )
    checkpoint_every_seconds: float = option(
        300.0,
        help="seconds between checkpoints; the best epoch and the last have one anyway (0: every epoch has one)",
        minimum=0,
        may_change=True,
    )
    storage_retry_seconds: float = option(
        60.0,
        help="seconds for which reads and writes are tried again while storage does not answer",
        minimum=0,
        may_change=True,
    )
    keep_checkpoints: int = option(
        2, help="how many of the newest checkpoints to keep; the best one is always kept", minimum=1, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a training run. The names of settings are unique across sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        model, data, size = MODELS[self.model.model], self.data, self.data.image_size
        if model.fixed_image_size and size != model.fixed_image_size:
            raise UserError(
                f"model {model.name} flattens its last feature map, so --image-size must be {model.fixed_image_size}, "
                f"not {size}"
            )
        if size < model.min_image_size:
            raise UserError(f"model {model.name} needs an --image-size of {model.min_image_size} or more, not {size}")
        if self.model.finetune and not model.has_base:
            raise UserError(f"--finetune is for {with_base()}: {model.name} has no frozen base")
        if data.features == "cached":
            if not model.has_base or self.model.finetune:
                raise UserError(f"--features cached is for {with_base()} with a frozen base; leave it out for others")
            if data.crop_padding or data.cutout_size or data.synthetic_data:
                raise UserError(
                    "--features cached keeps one output per image and flip: it does not go with --crop-padding, "
                    "--cutout-size or --synthetic-data"
                )
        if data.crop_padding >= size or data.cutout_size >= size:
            raise UserError(f"--crop-padding and --cutout-size must be less than --image-size {size}")

    def replace(self, **values: Any) -> "Config":
        """Returns a checked copy with some settings changed, by short name. Raises UserError."""
        sections = {}
        for f in dataclasses.fields(self):
            section = getattr(self, f.name)
            changed = {k: values.pop(k) for k in list(values) if k in section.__dataclass_fields__}
            sections[f.name] = dataclasses.replace(section, **changed)
        if values:
            name = next(iter(values))
            raise UserError(f"unknown setting {name!r}{nearest(name, option_fields())}")
        return Config(**sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the values by section and name."""
        return dataclasses.asdict(self)

    def values(self) -> dict[str, Any]:
        """Returns the values by name."""
        return {name: value for section in self.to_dict().values() for name, value in section.items()}

    @staticmethod
    def from_dict(values: dict) -> "Config":
        """The inverse of to_dict. Raises UserError for a setting that this version does not know."""
        return Config().replace(**{k: v for section in values.values() for k, v in section.items()})


def option_fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """Returns short name -> (section name, field) for every setting of Config."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {f.name: (s, f) for s, cls in sections.items() for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


# A resumed run may change these settings: the number of epochs, and settings that do not change what is learned.
FREE_ON_RESUME = {name for name, (_, f) in option_fields().items() if f.metadata["may_change"]}


def with_base() -> str:
    """Returns the names of the networks that have a base to freeze or fine-tune."""
    return ", ".join(name for name, spec in MODELS.items() if spec.has_base)
