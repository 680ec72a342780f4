"""Seeds of single requests, drawn from the run's seed and where in the run a completion is made.

A global generator would make what is sampled depend on everything that drew from it before; with these, a resumed
run samples what the unbroken run would have.
"""

import hashlib


def request_seed(*where: int | str) -> int:
    """A seed in [0, 2**31) from the run's seed, the purpose, the step and the request's index."""
    digest = hashlib.blake2b("/".join(map(str, where)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF
