"""One Redis, one model and one cluster of fake workers for all of them."""

from tests.gateway.conftest import model, redis_url, shared, up  # noqa: F401
