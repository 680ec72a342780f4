"""The results as text: a line for each part, below it its figures."""

LEFT_OUT = ("status", "seconds", "error", "machine", "unmet", "by_layout")
WIDTH = 110


def table(results: dict[str, dict]) -> str:
    lines = []
    for name, result in results.items():
        machine = result.get("machine", {})
        lines.append(f"{name:<12}{result['status']:<9}{result['seconds']:>6.0f} s  {machine.get('device', '')}")
        lines += [f"    did not hold: {claim}" for claim in result.get("unmet", [])]
        if result["status"] != "ok" and not result.get("unmet"):
            lines.append(f"    {result['error'].splitlines()[-1][:WIDTH] if result['error'] else 'said nothing'}")
        for key, value in flat(result):
            lines.append(f"    {key:<64}{shown(value)}")
    return "\n".join(lines)


def flat(figures: dict, before: str = "") -> list[tuple[str, object]]:
    """(path, value) of every figure, in order."""
    found = []
    for key, value in figures.items():
        if key in LEFT_OUT:
            continue
        path = f"{before}{key}"
        found += flat(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return found


def shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)[:WIDTH]
