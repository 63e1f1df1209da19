"""The API's own description, OpenAPI 3.1: https://spec.openapis.org/oas/v3.1.0"""

import importlib.metadata
from typing import Any

from llama.server.requests import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

Json = dict[str, Any]

ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# Each status that a call may get besides 200.
STATUSES = {
    "400": "a wrong body, prompt or option",
    "401": "the API key is missing or wrong",
    "403": "this Host or Origin may not call",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too long",
    "415": "the content type is not application/json",
    "429": "too many requests are open",
    "500": "the engine has failed",
    "503": "the server is stopping",
    "504": "no answer in time",
}
CALLS: dict[str, tuple[type[Body], str, list[str]]] = {
    "/v1/chat/completions": (
        ChatBody, "Answer a dialog.", ["application/json", "text/event-stream"],
    ),
    "/v1/completions": (
        CompletionBody, "Continue texts.", ["application/json", "text/event-stream"],
    ),
    "/tokenize": (TokenizeBody, "The token ids of a text or a dialog.", ["application/json"]),
    "/detokenize": (DetokenizeBody, "The text of token ids.", ["application/json"]),
}  # fmt: skip
READS = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the engine is alive.",
}


def describe(models: list[str]) -> Json:
    """The description of all routes but the chat page. models: the names that are served."""
    schemas: Json = {"Error": ERROR}
    paths: Json = {
        path: {"get": {"summary": text, "responses": _responses(["application/json"])}}
        for path, text in READS.items()
    }
    for path, (body, text, kinds) in CALLS.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        if schema["properties"].get("model", {}).get("type") == "string":
            schema["properties"]["model"] = {"enum": models}
        schemas |= schema.pop("$defs", {}) | {body.__name__: schema}
        content = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": content}},
                "responses": _responses(kinds),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llama-reference",
            "version": importlib.metadata.version("llama-reference"),
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(kinds: list[str]) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    good: Json = {"description": "The answer.", "content": {kind: {} for kind in kinds}}
    refused = {status: {"description": text, "content": error} for status, text in STATUSES.items()}
    return {"200": good} | refused
