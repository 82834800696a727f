"""Who judges: an OpenAI-compatible endpoint, or a vision-language model through transformers."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, Protocol

from cmlora.errors import CMLoRAError
from cmlora.lab.score.pictures import Shot

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


class NoAnswerError(Exception):
    """The judge did not answer this time; asking again may help."""


class Judge(Protocol):
    """Answers a question about two pictures."""

    name: str

    def ask(self, text: str, first: Shot, second: Shot) -> str:
        """The answer as it came.

        Raises:
            NoAnswerError: none came.
            CMLoRAError: none will come: a wrong key, model or address.
        """
        ...


class Endpoint:
    """POST {url}/chat/completions, as OpenAI, vLLM, llama.cpp and others serve it."""

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 120.0) -> None:
        """
        Args:
            url: up to /v1. key: name of the environment variable with the key; None: no key is sent.
            timeout: seconds for one answer, from the first byte sent to the last received.
        """
        if not url.startswith(("http://", "https://")):
            raise CMLoRAError(f"--url must begin with http:// or https://, got {url!r}")
        if key is not None and not os.environ.get(key):
            raise CMLoRAError(f"--key-env {key}: the environment has no such variable")
        self.name, self.model, self.timeout = f"{model} at {url}", model, timeout
        self.url, self.key = f"{url.rstrip('/')}/chat/completions", os.environ[key] if key else None

    def ask(self, text: str, first: Shot, second: Shot) -> str:
        pictures = [{"type": "image_url", "image_url": {"url": _data(shot)}} for shot in (first, second)]
        content = [{"type": "text", "text": text}, *pictures]
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            answer = json.loads(self._send(request))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            if error.code in BUSY:
                raise NoAnswerError(f"HTTP {error.code}") from None
            told = error.read(300).decode(errors="replace")
            raise CMLoRAError(f"{self.url} refused with HTTP {error.code}: {told}") from None
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:  # a time-out is an OSError
            raise NoAnswerError(f"{type(error).__name__}: {error}") from None
        if not isinstance(answer, str):
            raise NoAnswerError("the message has no text")
        return answer

    def _send(self, request: urllib.request.Request) -> bytes:
        deadline = time.monotonic() + self.timeout
        parts = []
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            while part := response.read1(65536):  # a server that sends a byte now and then has a deadline, too
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer in {self.timeout:g} s")
        return b"".join(parts)


class Local:
    """transformers' image-text-to-text pipeline with a model from a folder or hub id."""

    def __init__(self, model: str, tokens: int = 400) -> None:
        """tokens: at most so many in an answer."""
        from transformers import pipeline

        self.name, self.tokens = model, tokens
        try:
            self.pipe: Any = pipeline("image-text-to-text", model=model)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise CMLoRAError(f"--model {model!r} cannot be loaded as image-text-to-text: {reason}") from error

    def ask(self, text: str, first: Shot, second: Shot) -> str:
        pictures = [{"type": "image", "image": shot.open()} for shot in (first, second)]
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
        spent = {"max_new_tokens": self.tokens, "do_sample": False}
        made = self.pipe(text=messages, generate_kwargs=spent, return_full_text=False)
        return str(made[0]["generated_text"])


def _data(shot: Shot) -> str:
    return f"data:image/png;base64,{base64.b64encode(shot.path.read_bytes()).decode()}"
