"""`penstock status`: what a running system looks like from one of its gateways."""

import os
import sys
from collections.abc import Sequence

import httpx

from common.settings import load
from services.launcher.api import GatewayApi, NoGateway, refusal
from services.launcher.settings import StatusSettings
from services.launcher.tables import status_text


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if the gateway is ready, 1 if it is not or does not answer. Raises ConfigError."""
    settings = load(StatusSettings, argv, os.environ)
    api = GatewayApi(settings.url, settings.api_key)
    try:
        document = api.status()
    except httpx.HTTPStatusError as error:
        print(f"penstock status: {settings.url}: {refusal(error.response)}", file=sys.stderr)
        return 1
    except NoGateway as error:
        print(f"penstock status: {error}", file=sys.stderr)
        return 1
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"penstock status: {settings.url} does not answer: {error}", file=sys.stderr)
        return 1
    finally:
        api.close()
    print(status_text(document))
    return 0 if document["gateway"]["ready"] else 1
