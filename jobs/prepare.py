"""The job `prepare`, for `ray job submit`: the same as `cifar-dist prepare`."""

from cifar_dist.cli import run_job

if __name__ == "__main__":
    run_job("prepare")
