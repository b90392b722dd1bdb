"""What runs in the driver. Ray reads the environment when it is imported, so it is set before."""

from cifar_dist.environment import prepare_environment

prepare_environment()
