"""Talk to a language model with the openai package: limit what the server can do, and parse its answers.

An answer beyond a limit raises an exception of the HTTP library, so that the openai package asks again.
"""

import asyncio
import json
import sys
from collections import Counter
from contextlib import suppress

import openai

from nanoip2p.common.files import fold, tidy
from nanoip2p.common.schema import checked
from nanoip2p.dataset.config import Settings

SERVER_RETRIES = 5  # by the openai package, after status 429 or 5xx, or a bad answer
ANSWER_TOKENS = 256  # token limit of an answer, as in the original
DELIMITER = "\n%%\n"  # between instruction and caption, in the answers of a fine-tuned model
LONGEST_ANSWER = 2**20  # bytes; the answer to a caption has about 1,000
HTTP = sys.modules[openai.DefaultAsyncHttpxClient.__base__.__module__.split(".")[0]]  # httpx or httpx2


class Unusable(Exception):
    """The answer is not an edit. The message is "refused", "malformed", "unchanged" or "flagged"."""


class Client(openai.DefaultAsyncHttpxClient):
    """An HTTP client that limits the size and the total time of an answer, and never changes the host."""

    def __init__(self, seconds: float):
        # "identity" means no compression: a compressed answer could grow a thousandfold
        super().__init__(event_hooks={"request": [self.check_host], "response": [self.limit_size]},
                         headers={"Accept-Encoding": "identity"})
        self.seconds, self.home = seconds, None

    async def send(self, request, **options):
        """Send a request and read its whole answer: a JSON object, unless the status is an error.

        Limits the total time, because the timeout of the HTTP library starts again with each byte.
        """
        try:
            response = await asyncio.wait_for(super().send(request, **options), self.seconds)
            if response.is_success:
                read_object(response.content)
            return response
        except asyncio.TimeoutError:
            raise HTTP.ReadTimeout(f"no whole answer within {self.seconds:g} s (--timeout)") from None
        except ValueError as error:
            raise HTTP.RemoteProtocolError(str(error)) from None

    async def check_host(self, request) -> None:
        """Before each request: refuse a redirect to another host or port. From http to https is allowed."""
        url = request.url
        self.home = self.home or url
        same = (url.scheme, url.port) == (self.home.scheme, self.home.port)
        upgraded = (self.home.scheme, url.scheme) == ("http", "https") and url.port in (None, self.home.port)
        if url.host != self.home.host or not (same or upgraded):
            raise HTTP.RemoteProtocolError(f"the answer is a redirect to {url}, which is not followed")

    async def limit_size(self, response) -> None:
        """After the headers of each answer: limit its unpacked size. Refuse compression other than gzip."""
        if response.headers.get("content-encoding", "identity") not in ("identity", "gzip"):
            raise HTTP.DecodingError("the answer is compressed, although we asked for no compression")
        pieces = response.aiter_bytes()

        async def limited():
            size = 0
            async for piece in pieces:
                size += len(piece)
                if size > LONGEST_ANSWER:
                    raise HTTP.ReadError(f"the answer is longer than {LONGEST_ANSWER:,} bytes")
                yield piece

        response.aiter_bytes = limited


def read_object(content: bytes | str) -> dict:
    """Parse a JSON object. Raises ValueError for anything else."""
    try:
        return checked(json.loads(content), dict, "the answer")
    except (ValueError, RecursionError):
        raise ValueError("the answer is not a JSON object") from None


async def ask(resource, **request) -> dict:
    """Create a chat completion or another resource. Returns the answer, a JSON object (see Client.send)."""
    response = await resource.with_raw_response.create(**request)
    return response.http_response.json()


def connect(timeout: float = Settings.timeout, total: float | None = None) -> openai.AsyncOpenAI:
    """Make the client. Raises ValueError for a missing key or an invalid OPENAI_BASE_URL.

    timeout: maximum seconds without a byte. total: maximum seconds for a whole answer; default: timeout.
    """
    try:
        client = openai.AsyncOpenAI(max_retries=SERVER_RETRIES, timeout=timeout,
                                    http_client=Client(total or timeout))
        if not client.api_key.strip() or not client.api_key.isascii():  # not valid in a header
            raise openai.OpenAIError
        return client
    except openai.OpenAIError:
        raise ValueError("set OPENAI_API_KEY to your key, or to any word if the server needs none") from None
    except Exception as error:  # an error of the HTTP library
        raise ValueError(f"OPENAI_BASE_URL: {error}") from None


def explain(error: openai.APIError, client: openai.AsyncOpenAI) -> str:
    """The server's error with a hint, in one line. Hides the API key if it has 8 or more characters."""
    message, key = error.message, client.api_key.strip()
    if isinstance(error, openai.APIConnectionError):
        message += f" ({error.__cause__}); does OPENAI_BASE_URL name the right server, and does it run?"
    elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        message += "; is OPENAI_API_KEY right for this server?"
    if len(key) >= 8:  # a shorter key is a placeholder, which can be part of an ordinary word
        message = message.replace(key, "***")
    return f"{client.base_url} says: {message}"


def read_answer(reply: dict, caption: str) -> tuple[str, str]:
    """Parse a chat completion. Returns (instruction, edited caption). Raises Unusable if it holds no edit."""
    try:
        choice = checked(reply.get("choices"), list[dict], "choices")[0]
        message = checked(choice.get("message"), dict, "message")
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            raise Unusable("refused")
        content = checked(message.get("content"), str, "content")
        if choice.get("finish_reason") == "length":  # cut off; a text without JSON does not show this
            raise ValueError
        if DELIMITER in content:  # never in JSON, whose strings have no line breaks
            edit, output = map(tidy, content.split(DELIMITER))
        else:
            answer = read_object(content)
            edit, output = (tidy(checked(answer.get(key), str, key)) for key in ("edit", "output"))
        if not edit or not fold(output):
            raise ValueError
    except (ValueError, IndexError):
        raise Unusable("malformed") from None
    if fold(output) == fold(caption):
        raise Unusable("unchanged")
    return edit, output


def spent_tokens(reply: dict, most_in: int) -> Counter:
    """The tokens of a completion as the server counts them. Upper bounds replace missing or odd counts."""
    usage, spent = reply.get("usage"), Counter({"in": most_in, "out": ANSWER_TOKENS})
    for way, key in (("in", "prompt_tokens"), ("out", "completion_tokens")):
        with suppress(ValueError):
            spent[way] = checked(checked(usage, dict, "usage").get(key), int, key, 1, 10**9)
    return spent


def read_flags(reply: dict, n: int) -> list[bool]:
    """Parse the moderation of `n` texts: whether it objects to each. Raises ValueError for other replies."""
    results = checked(reply.get("results"), list[dict], "results")
    if len(results) != n:
        raise ValueError(f"the server judged {len(results)} texts, not {n}")
    return [checked(result.get("flagged"), bool, "flagged") for result in results]
