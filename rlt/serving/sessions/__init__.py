"""Whose sessions, models, samplers and checkpoints there are; a tenant is not told of another's."""
