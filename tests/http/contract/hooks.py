"""What schemathesis has to know of Headgate: how bodies are encoded, what it must not break for itself, and which
requests a gateway refuses although they have the form that openapi.json describes, each with the reason for which no
schema can say that.

CONTRACT_SEEN, if set, names a file that gets the statuses of every operation as JSON, so that a run in which nothing was
ever let in does not pass for a good one.
"""

import atexit
import gzip
import itertools
import json
import os
import re
from collections import defaultdict
from typing import NamedTuple

import schemathesis


class RightRefusal(NamedTuple):
    """A kind of refusal that is right, of a request that the description allows."""

    # Regular expressions: operationId; status, problem type, pointer or parameter, and words.
    operation: str
    refusal: str
    why: str


RIGHT_REFUSALS = [
    # Values that contradict each other. A parameter has a schema of its own, which knows nothing of the others.
    RightRefusal("ingest.*", "422 not_possible precision ", "the parameter precision is for one type of body"),
    RightRefusal("deleteDatasource", "422 not_possible incarnation ", "incarnation is for purge=true"),
    RightRefusal("listRecords", "422 not_possible after_offset ", "after_offset is for order=oldest"),
    RightRefusal("watchLive", "422 not_possible topic ", "a topic is one of a datasource, which is to be named"),
    RightRefusal("streamRecords", "422 not_possible from_offset ", "a stream begins at one place"),
    RightRefusal("readSeries", "422 not_possible .*(points|step)", "range, step and points decide how many steps there are"),
    # Time.
    RightRefusal("createKey", "422 not_possible /expires_at ", "a key ends in the future"),
    RightRefusal("quarantineKey", "422 not_possible /since ", "records were received in the past"),
    # What is there.
    RightRefusal("createDatasource", "422 not_possible .*to make an id from", "an id is made by transliteration"),
    RightRefusal("change(Datasource|Key)", "422 not_possible /limits/\\w+/max ", "max may be left out where one is set"),
    RightRefusal("createToken", "422 not_possible /scopes ", "a token has scopes that its key has"),
    RightRefusal("(ingest|influxWrite).*", "422 (id_conflict|validation|over_limit) ", "ids, schemas and limits are there"),
    RightRefusal("influxWrite.*", "422 - ", "the same, as InfluxDB says it"),
    RightRefusal("(ingest|influxWrite).*", "413 .*limit payload_bytes", "a limit of a datasource that the run has set"),
    RightRefusal("createKey|rotateKey", "422 over_limit ", "a datasource has a limit of keys"),
    # Texts in another grammar than that of regular expressions.
    RightRefusal("(create|import)Datasource|setSchema", "422 not_possible .*schema", "a schema of JSON Schemas is no part of one"),
    RightRefusal("setSchema|importDatasource", "4(00|22) \\w+ .*filter .* twice", "no keyword compares a member of items"),
    RightRefusal("(ingest|influxWrite).*", "400 .*(line protocol|no line with a point)", "the body is lines of InfluxDB"),
    RightRefusal("influxQuery", "400 ", "the statement stands in the query or in the form"),
    # JSON Schema counts characters, and what is stored is bounded in bytes.
    RightRefusal(".*", "(400|422) .*at most \\d+ (bytes|levels)", "bytes of UTF-8, and levels of a topic"),
    RightRefusal(".*", "400 .*topic filter has 1 to \\d+ bytes", "bytes of UTF-8; a key for all has the datasource before it"),
]

# Positive requests for these get a key that there is: no schema knows one.
OF_KEYS = ("changeKey", "rotateKey", "createToken", "quarantineKey")
SEEN = defaultdict(set)
ADDRESSES = itertools.count(1)
OWN_KEY_ID = os.environ["CONTRACT_OWN_KEY_ID"]
KEY_ID = os.environ["CONTRACT_KEY_ID"]


def operation_id(operation):
    return operation.definition.raw["operationId"]


def refusal(response):
    """Status, type, place and words of a problem, as RIGHT_REFUSALS have them."""
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    kind = problem.get("type", "/problems/-").rsplit("/", 1)[-1]
    place = problem.get("pointer") or problem.get("parameter") or "-"
    words = problem.get("detail") or problem.get("message") or problem.get("error") or ""
    return f"{response.status_code} {kind} {place} {words}"


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Keeps what is a failure: not the refusals of which RIGHT_REFUSALS knows."""
    if type(failure).__name__ != "RejectedPositiveData":
        return True
    said, name = refusal(response), operation_id(case.operation)
    return not any(
        re.fullmatch(known.operation, name) and re.match(known.refusal, said) for known in RIGHT_REFUSALS
    )


@schemathesis.hook
def before_call(context, case, kwargs):
    # Each request comes from an address of its own, by way of a proxy that the gateway trusts: it bounds the bad keys of one.
    n = next(ADDRESSES)
    case.headers = case.headers or {}
    case.headers["X-Forwarded-For"] = f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
    # The run's own key outlives it, and so does the datasource that it begins with.
    name, parameters = operation_id(case.operation), case.path_parameters or {}
    if parameters.get("key_id") == OWN_KEY_ID and name in ("revokeKey", "rotateKey", "quarantineKey"):
        parameters["key_id"] = "0" * 12
    if parameters.get("datasource") == "press-4" and name == "deleteDatasource":
        parameters["datasource"] = "press-5"
    if parameters.get("key_id") == KEY_ID and name == "revokeKey":
        parameters["key_id"] = "0" * 12
    if name in OF_KEYS and case.meta and case.meta.generation.mode.is_positive:
        parameters.update(datasource="press-4", key_id=KEY_ID)
    encode = {"gzip": gzip.compress, "zstd": zstd}.get(case.headers.get("Content-Encoding"))
    if encode:
        kwargs["auth"] = lambda request: encoded(request, encode)


def encoded(request, encode):
    body = request.body or b""
    if isinstance(body, (bytes, str)):
        request.body = encode(body.encode() if isinstance(body, str) else body)
    return request


def zstd(body):
    """A frame of RFC 8878 with the body in one raw block; Python's own library cannot write zstd everywhere."""
    header = (0xFD2FB528).to_bytes(4, "little") + b"\xa0" + len(body).to_bytes(4, "little")
    blocks = [body[at : at + (1 << 16)] for at in range(0, len(body), 1 << 16)] or [b""]
    last = len(blocks) - 1
    return header + b"".join(
        (len(block) << 3 | (n == last)).to_bytes(3, "little") + block for n, block in enumerate(blocks)
    )


@schemathesis.serializer("application/x-ndjson")
def ndjson(context, value):
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


@schemathesis.hook
def after_call(context, case, response):
    SEEN[operation_id(case.operation)].add(response.status_code)


@atexit.register
def write_seen():
    if path := os.environ.get("CONTRACT_SEEN"):
        with open(path, "w") as file:
            json.dump({name: sorted(statuses) for name, statuses in SEEN.items()}, file)
