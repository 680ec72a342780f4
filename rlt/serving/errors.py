"""What a client asked for and cannot have; anything that it sent and that cannot be right is `rlt.errors.Refused`."""


class Missing(LookupError):
    """Not there, or another tenant's, which a client is not told apart (404)."""


class Gone(LookupError):
    """Was there: a session that is over, a result that was kept long enough (410)."""


class WrongKey(PermissionError):
    """401."""


class Busy(RuntimeError):
    """The queue is full: come again (429)."""
