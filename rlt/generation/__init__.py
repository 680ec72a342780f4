"""Engines that write completions, and the seeds of their requests."""
