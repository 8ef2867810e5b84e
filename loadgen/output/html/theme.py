"""How plots look: names of colours, axes and the layout they share. Pure.

A colour is written `$name`; the page replaces it with its own variable `--name`, which differs between light and dark.
The hues are chosen to stay apart for colour-blind readers (after Okabe and Ito), and a hue means one thing:
blue is prefill, orange is decode, purple is both in one worker, red is failure.
"""

from typing import Any  # Any: plotly's JSON

Json = dict[str, Any]

CYCLE = ("$blue", "$orange", "$green", "$purple", "$sky", "$yellow", "$red", "$grey")
DASHES = ("solid", "dash", "dot", "dashdot")
ROLES = {"prefill": "$blue", "decode": "$orange", "mixed": "$purple"}
PHASES = {
    "queue": ("$grey", "waits in the gateway"),
    "retries": ("$red", "attempts that failed"),
    "route": ("$purple", "routing"),
    "prefill_queue": ("$sky", "waits for prefill"),
    "compute": ("$blue", "prefill computes"),
    "grant_wait": ("$yellow", "waits for KV memory"),
    "transfer": ("$green", "KV transfer"),
    "wire": ("$orange", "between processes"),
    "reply": ("$grey", "first token to the socket"),
}
"""Phase: colour and what readers call it, in the order of time."""
MEMORY_OWNERS = {
    "weights": ("$grey", "weights"),
    "activations": ("$yellow", "activations"),
    "kv_requests": ("$green", "KV of requests"),
    "kv_prefix": ("$sky", "KV kept for reuse"),
    "parked": ("$purple", "KV of parked requests"),
    "cached": ("$blue", "KV in the store"),
    "kv_free": ("$line", "free"),
    "parked_free": ("$line", "free"),
    "free": ("$line", "free"),
    "released": ("$orange", "given back to the system"),
}
"""Who has memory: colour and what readers call it, from the ground up."""
OTHER_OWNERS = "$red"
REST = ("$grey", "gateway, network, client")
OTHER_PHASES = ("$purple", "$red")
CACHED_SCALE = [[0, "$scale0"], [0.5, "$scale1"], [1, "$scale2"]]
_SECONDS_FROM_MS = 10_000


def role_color(role: str) -> str:
    """Of a worker."""
    return ROLES.get(role, "$grey")


def run_style(position: int) -> tuple[str, str]:
    """Colour and dash of the run at this position; 32 of them differ."""
    return CYCLE[position % len(CYCLE)], DASHES[position // len(CYCLE) % len(DASHES)]


def unit_for(largest_ms: float) -> tuple[float, str]:
    """What to multiply milliseconds by on an axis that reaches this far, and the unit then."""
    return (1e-3, "s") if largest_ms >= _SECONDS_FROM_MS else (1.0, "ms")


def axis(title: str = "", **changes: Any) -> Json:
    """An axis with thin grid lines."""
    base: Json = {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": "$grid",
        "linecolor": "$line",
        "zeroline": False,
        "automargin": False,  # plots under each other stay aligned
        "tickformat": ",",
    }
    return base | changes


def layout(x: Json, y: Json, **changes: Any) -> Json:
    """A plot with two axes and no legend: the page draws keys."""
    bottom_px = 44 if x["title"]["text"] else 26
    return {"xaxis": x, "yaxis": y, **frame(bottom_px), **changes}


def frame(bottom_px: int) -> Json:
    """What every plot has."""
    return {
        "showlegend": False,
        "margin": {"l": 64, "r": 16, "t": 10, "b": bottom_px},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "$muted"},
        "paper_bgcolor": "$clear",
        "plot_bgcolor": "$clear",
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "$raised", "bordercolor": "$line", "font": {"color": "$ink"}},
    }


def target_line(value: float, text: str, *, axis_name: str = "y") -> tuple[Json, Json]:
    """A dashed line across the plot at a target, and its label: shape and annotation."""
    across = "x" if axis_name.startswith("y") else "y"
    place = {f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
    along = axis_name[0]
    shape = {
        "type": "line",
        "layer": "between",
        **place,
        f"{along}ref": axis_name,
        f"{along}0": value,
        f"{along}1": value,
        "line": {"color": "$red", "width": 1.5, "dash": "4px,3px"},
    }
    label = {
        "text": text,
        "showarrow": False,
        "font": {"color": "$red", "size": 11},
        f"{across}ref": "paper",
        across: 0 if across == "x" else 1,
        f"{along}ref": axis_name,
        along: value,
        "xanchor": "left",
        "yanchor": "bottom",
    }
    return shape, label
