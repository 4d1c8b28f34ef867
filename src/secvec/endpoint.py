"""A judge behind an OpenAI-compatible endpoint: the only file that speaks HTTP; no torch."""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from secvec.errors import InputError, UsageError
from secvec.judges import Asked, Finding, Verdict, fill
from secvec.rules import STRICT, RateName

_TRIES = 4
_TIMEOUT_S = 120.0
_FIRST_WAIT_S = 0.5
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
# Of the request as such, not of one answer: asking on would only repeat them.
_WRONG_SETTINGS = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})


@checked(frozen=True, config=STRICT)
class EndpointConfig:
    """Settings of an endpoint judge, in a YAML file.

    url           up to and with /v1; model: as the server names it
    prompt        what it is asked, with {prompt} and {answer} in it
    yes, no       patterns (Python's `re`) of its answer that count as 1 and as 0; matching neither is unscored
    label         what a yes means; names the rate
    api_key_env   the environment variable that holds the key, where one is needed
    max_tokens    of its answer (16)
    parallel      requests at a time (4)
    """

    url: Annotated[str, Field(pattern=r"^https?://")]
    model: str
    prompt: str
    yes: re.Pattern[str]
    no: re.Pattern[str]
    label: RateName
    api_key_env: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 16
    parallel: Annotated[int, Field(ge=1)] = 4

    def __post_init__(self) -> None:
        if "{answer}" not in self.prompt:
            raise ValueError("prompt: expected {answer} in it")

    def key(self) -> str:
        """Return the key for the server, without the spaces around it."""
        return os.environ[self.api_key_env].strip() if self.api_key_env is not None else ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would take the key and the answers to another server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class EndpointJudge:
    """name: that of the settings' file."""

    name: str
    config: EndpointConfig

    @classmethod
    def load(cls, file: Path) -> "EndpointJudge":
        """Read a judge's settings. Raises UsageError naming the setting that is wrong."""
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(document, dict):
                # YAML 1.1 reads a bare yes or no as a truth value.
                words: dict[Any, str] = {True: "yes", False: "no"}
                document = {words.get(key, key): value for key, value in cast(dict[Any, Any], document).items()}
            config = TypeAdapter(EndpointConfig).validate_json(json.dumps(document))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
            raise UsageError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "settings"
            raise UsageError(f"{file}: {where}: {first['msg']}; docs/suites.md shows the settings") from error
        if config.api_key_env is not None and config.api_key_env not in os.environ:
            raise UsageError(f"{file}: expected the environment variable {config.api_key_env}, found none; export it")
        if not (config.key().isprintable() and config.key().isascii()):
            raise UsageError(f"{file}: {config.api_key_env}: expected a key of printable ASCII characters")
        return cls(file.stem, config)

    @property
    def labels(self) -> Sequence[str]:
        return (self.config.label,)

    def identity(self) -> Mapping[str, Any]:
        prompt = hashlib.sha256(self.config.prompt.encode()).hexdigest()
        return {"kind": "endpoint", "url": self.config.url, "model": self.config.model, "prompt": f"sha256:{prompt}"}

    def read(self, output: str) -> Verdict:
        yes, no = (pattern.search(output) is not None for pattern in (self.config.yes, self.config.no))
        return {self.config.label: float(yes)} if yes != no else {}

    def judge(self, asked: Sequence[Asked]) -> Iterator[list[Finding]]:
        """Raises InputError when the server cannot be reached or refuses every request; what it said is kept."""
        with ThreadPoolExecutor(self.config.parallel) as threads:
            for start in range(0, len(asked), self.config.parallel):
                part = asked[start : start + self.config.parallel]
                yield list(threads.map(self._ask, range(start, start + len(part)), part))

    def _ask(self, number: int, asked: Asked) -> Finding:
        request = self._request(fill(self.config.prompt, asked))
        wait_s = _FIRST_WAIT_S
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
                    return _read_completion(number, response.read())
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in _WRONG_SETTINGS:
                    raise InputError(f"{request.full_url}: expected an answer, found HTTP {error.code}") from error
                if error.code not in _BUSY:
                    return Finding(number, None, f"the judge refused it: HTTP {error.code}")
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            if last:
                raise InputError(
                    f"{request.full_url}: no answer after {_TRIES} tries ({problem}); the same command goes on"
                ) from problem
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def _request(self, content: str) -> urllib.request.Request:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.config.api_key_env is not None:
            headers["Authorization"] = f"Bearer {self.config.key()}"
        url = self.config.url.rstrip("/") + "/chat/completions"
        return urllib.request.Request(url, json.dumps(body).encode(), headers)


def _read_completion(number: int, data: bytes) -> Finding:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return Finding(number, None, "the judge's answer is no chat completion")
    return Finding(number, content) if isinstance(content, str) else Finding(number, None, "the judge said nothing")
