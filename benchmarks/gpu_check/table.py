"""The results as text: a line for each part, below it its figures."""

import textwrap

LEFT_OUT = ("status", "seconds", "error", "machine", "unmet")
TOO_LONG = "by_layout"  # stands in the file alone
WIDTH = 110


def table(results: dict[str, dict]) -> str:
    lines = []
    for name, result in results.items():
        machine = result.get("machine", {})
        lines.append(f"{name:<12}{result['status']:<9}{result['seconds']:>6.0f} s  {machine.get('device', '')}")
        lines += [f"    did not hold: {claim}" for claim in result.get("unmet", [])]
        if result["status"] != "ok" and not result.get("unmet"):
            lines.append(f"    {result['error'].splitlines()[-1][:WIDTH] if result['error'] else 'said nothing'}")
        lines += figure_lines({key: value for key, value in result.items() if key not in LEFT_OUT}, "    ")
    return "\n".join(lines)


def figure_lines(figures: dict, margin: str, title: str = "") -> list[str]:
    """Figures that belong together share lines, behind their title; what is nested stands below, further in."""
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict) and key != TOO_LONG}
    text = title + " · ".join(f"{key} {shown(value)}" for key, value in plain.items())
    lines = textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=f"{margin}    ", break_on_hyphens=False)
    for key, value in figures.items():
        if isinstance(value, dict):
            lines += figure_lines(value, f"{margin}    " if title else margin, f"{key}: ")
    return lines


def shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
