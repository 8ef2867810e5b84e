"""The part of the Compose specification that compose.yaml uses, as a JSON schema in our own words.

Closed on purpose: a key that is not listed here fails, so a misspelt one cannot slip through.
Source: the Compose specification (compose-spec), services and volumes elements.
"""

from typing import Any

DURATION = {"type": "string", "pattern": r"^(\d+(us|ms|s|m|h))+$"}
NAME = "^[a-zA-Z0-9._-]+$"
WORDS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
SCALARS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}

BUILD = {
    "type": "object",
    "required": ["context"],
    "additionalProperties": False,
    "properties": {
        "context": {"type": "string"},
        "dockerfile": {"type": "string"},
        "target": {"type": "string"},
        "args": SCALARS,
    },
}
DEPENDS_ON = {
    "type": "object",
    "patternProperties": {
        NAME: {
            "type": "object",
            "required": ["condition"],
            "additionalProperties": False,
            "properties": {
                "condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
            },
        }
    },
    "additionalProperties": False,
}
HEALTHCHECK = {
    "type": "object",
    "required": ["test"],
    "additionalProperties": False,
    "properties": {
        "test": {"type": "array", "items": {"type": "string"}, "minItems": 2, "prefixItems": [{"const": "CMD"}]},
        "interval": DURATION,
        "timeout": DURATION,
        "start_period": DURATION,
        "retries": {"type": "integer", "minimum": 1},
    },
}
DEVICES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["capabilities"],
        "additionalProperties": False,
        "properties": {
            "driver": {"type": "string"},
            "count": {"type": ["integer", "string"]},
            "device_ids": WORDS,
            "capabilities": WORDS,
        },
    },
}
DEPLOY = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "reservations": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"devices": DEVICES},
                }
            },
        }
    },
}
ULIMITS = {
    "type": "object",
    "patternProperties": {
        "^[a-z]+$": {
            "type": "object",
            "required": ["soft", "hard"],
            "additionalProperties": False,
            "properties": {"soft": {"type": "integer"}, "hard": {"type": "integer"}},
        }
    },
}
SERVICE = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string"},
        "build": BUILD,
        "command": WORDS,
        "entrypoint": WORDS,
        "environment": SCALARS,
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^[a-z]+:/[a-z/]+(:ro)?$"}},
        "ports": {"type": "array", "items": {"type": "string"}},
        "networks": WORDS,
        "secrets": {"type": "array", "items": {"type": "string"}},
        "profiles": WORDS,
        "depends_on": DEPENDS_ON,
        "healthcheck": HEALTHCHECK,
        "deploy": DEPLOY,
        "ulimits": ULIMITS,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": DURATION,
        "init": {"type": "boolean"},
    },
}
COMPOSE: dict[str, Any] = {
    "type": "object",
    "required": ["services"],
    "additionalProperties": False,
    "patternProperties": {"^x-": {}},
    "properties": {
        "services": {"type": "object", "patternProperties": {NAME: SERVICE}, "additionalProperties": False},
        "networks": {"type": "object", "additionalProperties": {"type": ["object", "null"]}},
        "volumes": {"type": "object", "additionalProperties": {"type": ["object", "null"]}},
        "secrets": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["file"],
                "additionalProperties": False,
                "properties": {"file": {"type": "string"}},
            },
        },
    },
}
