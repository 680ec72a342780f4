"""A rank that sends its weights by NCCL over sockets: `python tests/nccl_rank.py PLANS LAUNCHER`."""

import nccl_by_sockets

from rlt.commands import rank

if __name__ == "__main__":
    nccl_by_sockets.install()
    rank.main()
