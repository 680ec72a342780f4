"""What clients and server say to each other: plain dataclasses of numpy arrays, and their protobuf and JSON forms.

Nothing here needs torch, so that a client can use it alone.
"""
