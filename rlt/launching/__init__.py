"""Ranks of a run on one or several machines: their environment, their watching over, their end."""
