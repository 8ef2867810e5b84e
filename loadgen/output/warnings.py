"""What a reader of a run's numbers must know before believing them. Pure."""

from loadgen.results.result import Result
from loadgen.results.timeline import LeakCheck


def warnings(result: Result) -> list[str]:
    """What a reader of the numbers must know, one sentence each."""
    summary, found = result.summary, list(result.health.warnings)
    if result.saturation is not None and result.saturation.detected:
        found.append(f"the server was saturated, latencies grew with the length of the run: {result.saturation.why}")
    if result.server.leak_check is not None and result.server.leak_check.held:
        found.append(
            "the server still held after the run what it did not hold before, for this run or for other clients: "
            f"{_held(result.server.leak_check)}"
        )
    if result.server.leak_check_failed:
        found.append(f"whether the server gave everything back is not known: {result.server.leak_check_failed}")
    found += result.facts.notes
    if summary.cached_tokens and result.facts.settings.get("dataset") == "random":
        share = summary.cached_tokens / max(1, summary.input_tokens)
        found.append(f"{share:.0%} of the input came from the server's prefix cache; another --seed sends new prompts")
    if summary.wrong_output_lengths:
        found.append(
            f"{summary.wrong_output_lengths} of {summary.completed} answers had another length than asked for: "
            "the server does not know ignore_eos, or the context is too short"
        )
    if summary.wrong_input_lengths and result.facts.endpoint == "completions":
        found.append(f"{summary.wrong_input_lengths} prompts were counted differently by the server than sent")
    return found


def _held(check: LeakCheck) -> str:
    changes = (f"{name} {before:g} before, {after:g} after" for name, (before, after) in check.held.items())
    return f"{'; '.join(changes)} (waited {check.waited_s:.1f} s)"
