"""launch.py for weights by NCCL over sockets, where there is no GPU (nccl_by_sockets.py)."""

from pathlib import Path

from rlt.commands import launch
from rlt.planning import transfer

if __name__ == "__main__":
    transfer.has_gpus = lambda config, gpus: True
    launch.RANK = (str(Path(__file__).with_name("nccl_rank.py")),)
    launch.main()
