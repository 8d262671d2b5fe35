"""The JSON Schema of a study file, for editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.spec.architecture import KEYS
from tuner.spec.hyperparameter import Hyperparameter
from tuner.spec.space import BLOCK_KEYS, DENSE_KEYS, OUTPUT_KEYS
from tuner.spec.spec import MAX_NAME_LENGTH, NAME_PATTERN, Settings

#: What the schema's file is called beside a study file, and the study file's line that names it.
SCHEMA_FILE = "tuner.schema.json"
SCHEMA_LINE = f"#:schema {SCHEMA_FILE}\n"


def space_schema() -> dict[str, Any]:
    """The JSON schema of `[space]`: per key a bare value, a range where it is a number, choices."""
    properties = {
        name: {"description": key.meaning, "default": key.default, **_entry_schema(key)}
        for name, key in KEYS.items()
    }
    return _with_layers(properties) | {
        "description": "A bare value is fixed, a table is searched. [space.block1], [space.dense1] "
        "and [space.output] override for one block or layer."
    }


def known_schema() -> dict[str, Any]:
    """The JSON schema of `[[known]]`."""
    return {
        "type": "array",
        "description": "Configurations to try first; what is not named takes the middle.",
        "items": _with_layers({name: _bare_schema(key) for name, key in KEYS.items()}),
    }


def _with_layers(properties: dict[str, Any]) -> dict[str, Any]:
    def table(keys: Sequence[str]) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: properties[key] for key in keys},
        }

    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties | {"output": table(OUTPUT_KEYS)},
        "patternProperties": {
            "^block[1-9][0-9]*$": table(BLOCK_KEYS),
            "^dense[1-9][0-9]*$": table(DENSE_KEYS),
        },
    }


def _bare_schema(key: Hyperparameter) -> dict[str, Any]:
    if key.kind == "boolean":
        return {"type": "boolean"}
    if key.kind == "choice":
        return {"enum": list(key.choices)}
    return {
        "type": key.kind,
        "exclusiveMinimum" if key.open_low else "minimum": key.low,
        "exclusiveMaximum" if key.open_high else "maximum": key.high,
    }


def _entry_schema(key: Hyperparameter) -> dict[str, Any]:
    bare = _bare_schema(key)
    choices = {
        "type": "object",
        "additionalProperties": False,
        "required": ["choices"],
        "properties": {
            "choices": {"type": "array", "minItems": 1, "uniqueItems": True, "items": bare}
        },
    }
    if key.kind in ("boolean", "choice"):
        return {"anyOf": [bare, choices]}
    step = {"type": key.kind, "exclusiveMinimum": 0}
    searched = {
        "type": "object",
        "additionalProperties": False,
        "required": ["low", "high"],
        "properties": {"low": bare, "high": bare, "step": step, "log": {"type": "boolean"}},
    }
    return {"anyOf": [bare, searched, choices]}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, for editors (`tuner check --schema`)."""
    schema = _without_null(Settings.model_json_schema(by_alias=False))
    schema["properties"] |= {"space": space_schema(), "known": known_schema()}
    patience = schema["$defs"]["TrainingSettings"]["properties"]["patience"]
    patience["anyOf"] = [{"type": patience.pop("type"), "minimum": patience.pop("minimum")}]
    patience["anyOf"].append({"const": "none"})
    text = {"type": "string", "minLength": 1}
    schema["properties"]["name"] |= text | {"maxLength": MAX_NAME_LENGTH, "pattern": NAME_PATTERN}
    truncate = schema["$defs"]["DataSettings"]["properties"]["truncate"]
    truncate["anyOf"] = [
        {"type": truncate.pop("type"), "enum": truncate.pop("enum")},
        {"type": "boolean", "deprecated": True},  # of study files of earlier versions
    ]
    source = schema["$defs"]["DataSettings"]["properties"]["source"]
    source["anyOf"] = [
        {
            "type": "string",
            "pattern": r"^(solubility|synthetic|.*\.[nN][pP][zZ]|.*\.[cCtT][sS][vV](\.[gG][zZ])?)$",
        },
        {"$ref": "#/$defs/FastaPair"},
        {"$ref": "#/$defs/SplitFiles"},
    ]
    source.pop("oneOf", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Study file of the tuner",
        "description": "A fixed hyperparameter is a bare value, a searched one a table.",
    }


def _without_null(schema: Any) -> Any:
    """The schema without what stands for None: TOML knows no null, one leaves the key out."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    cleaned = {key: _without_null(value) for key, value in schema.items()}
    if cleaned.get("default", ...) is None:
        del cleaned["default"]
    options = [option for option in cleaned.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        del cleaned["anyOf"]
        cleaned |= options[0]
    return cleaned
