"""Thin subclasses of TRL's trainers, and what a run leaves behind."""
