"""One Redis, one model and one cluster of fake workers for all of them; and checkpoints that can be loaded."""

from tests.gateway.conftest import model, redis_url, shared, up  # noqa: F401
from tests.services.worker.conftest import checkpoint  # noqa: F401
