"""Figures in the form that Prometheus reads, without its library."""


def read_metrics(text: str) -> dict[str, float]:
    """By name and labels, as they stand in the text; comments are left out."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
