"""python -m cifar_dist JOB"""

from cifar_dist.cli import main

if __name__ == "__main__":
    main()
