"""What became of the gateway's decisions, as counters. Pure."""

from gateway.core.placed import Placed


class RoutingTotals:
    """Since the start; keys are Prometheus series without prefix."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}

    def add(self, series: str, amount: float = 1.0) -> None:
        """Count; `series` may carry labels: `retries_total{kind=replay}`."""
        self._counts[series] = self._counts.get(series, 0.0) + amount

    def on_placed(self, placed: Placed) -> None:
        """A request was sent to its workers."""
        route = placed.route
        for side, choice in (("prefill", route.entry_choice), ("decode", route.decode_choice)):
            if choice is not None:
                rule = choice.rule.partition("=")[0]
                self.add(f"routed_total{{rule={rule},side={side}}}")
                self.add(f"gated_workers_total{{side={side}}}", choice.gated)
        if route.local is not None:
            self.add(f"local_prefills_total{{reason={route.local}}}")
        if placed.fetch is not None:
            self.add("fetch_hints_total")
        if placed.degraded:
            self.add("degraded_routes_total")

    def on_first_token(self, placed: Placed, *, took_ms: float, cached_tokens: int | None) -> None:
        """The prompt is computed: how right were the predictions? `cached_tokens` None: the worker did not say."""
        self.add("first_tokens_total")
        self.add("predicted_ms_total", placed.predicted_ms)
        self.add("actual_ms_total", took_ms)
        self.add("prediction_error_ms_total", abs(placed.predicted_ms - took_ms))
        if cached_tokens is not None:
            self.add("predicted_hit_tokens_total", placed.hit_tokens)
            self.add("actual_hit_tokens_total", cached_tokens)
            self.add("hit_prediction_error_tokens_total", abs(placed.hit_tokens - cached_tokens))

    def counters(self) -> dict[str, float]:
        """All of them."""
        return dict(self._counts)
