"""How far our networks are from the deck's code in real Keras, over several seeds: the errors behind docs/fidelity.md.

    python benchmarks/parity.py [--num-seeds N]

For each seed tests/parity/keras_reference.py draws weights, BatchNorm statistics and images and stores what Keras
computes; tests/parity/comparison.py has the errors. Every weight format must give the same weights. Needs uv, which
makes Keras's environment, some three minutes a seed, and 2 GB of disk. Real images of CIFAR-10 are half of each batch
where tests/parity/keras_run.py finds them.

Prints a table and writes benchmarks/results/parity.json.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from side_by_side import RESULTS, store, summary, table

from cifar_dist.command_line import Parser
from cifar_dist.errors import exit_code_of

sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))

import comparison
from keras_run import images_option, run_keras


def errors_of(reference: Path) -> Iterator[tuple[str, float]]:
    """(what, error) of one seed: max abs error of the logits over their scale, relative error of losses."""
    for file in (*comparison.BASE_FILES, *comparison.WHOLE_FILES, "fan.keras"):
        comparison.check_format(file, reference)
    for name in comparison.FP32 + comparison.FLOAT64:
        yield f"{name}, inference", comparison.inference_error(name, reference)
        yield f"{name}, training mode", comparison.training_error(name, reference)
    for name in comparison.FLOAT64:
        losses, statistics = comparison.adam_errors(name, reference)
        yield f"{name}, losses of ten Adam steps", losses
        yield f"{name}, moving statistics after ten Adam steps", statistics


def main(num_seeds: int, out: Path) -> None:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as shared:
        images = images_option(Path(shared))
        for seed in range(num_seeds):
            with tempfile.TemporaryDirectory() as folder:
                run_keras(folder, "--seed", seed, *images)
                for what, error in errors_of(Path(folder)):
                    found.setdefault(what, []).append(error)
                    print(f"seed {seed}, {what}: {error:.2e}", flush=True)
    results = {what: {**summary(errors), "errors": errors} for what, errors in found.items()}
    rows = [(what, *(f"{r[k]:.2e}" for k in ("median", "low", "high"))) for what, r in results.items()]
    print(table((f"{num_seeds} seeds", "median", "least", "greatest"), rows))
    print(store("parity", {"with_real_images": bool(images), "errors": results}, out))


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    sys.exit(exit_code_of(lambda: main(given.num_seeds, given.out), given.debug))
