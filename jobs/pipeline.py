"""The job `pipeline`, for `ray job submit`: the same as `cifar-dist pipeline`."""

from cifar_dist.cli import run_job

if __name__ == "__main__":
    run_job("pipeline")
