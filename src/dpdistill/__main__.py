"""`python -m dpdistill`, also for torchrun: `torchrun --nproc-per-node 4 -m dpdistill dataset …`."""

from .cli import main

if __name__ == "__main__":
    main()
