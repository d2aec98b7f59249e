"""Text to token ids and back, for the model in one folder.

Owns encoding, decoding, the incremental detokenizer, and the reading of a folder's tokenizer files; chat templates are
`engine.chat_template`. The work is done by the `tokenizers` library on `tokenizer.json`; what transformers adds to that
file from `tokenizer_config.json` is done here, because importing transformers costs seconds and memory.

Encoding a long text or rendering a chat takes milliseconds to seconds: callers on an event loop use a worker thread.
The library releases the interpreter lock meanwhile, for long texts, and one Tokenizer serves any number of threads.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from engine.chat_template import DEFAULT_MAX_CHARS, ChatTemplate
from engine.errors import ContextTooLong, InvalidCheckpoint, InvalidRequest

if TYPE_CHECKING:
    import tokenizers

_SHOWN = ("<tool_call>", "</tool_call>")  # text of an answer even where a vocabulary declares them as control tokens
_LONG = 4096  # characters; a longer text is encoded as a batch of one, since the library lends the lock away for batches only
CHARS_PER_TOKEN = 16  # ordinary text has 3 to 5; a text with more than this for every free token is refused unread


class Tokenizer:
    """The tokenizer of one model. Public attributes:

    vocab_size: one more than the highest token id (the model's own vocabulary may be padded beyond it);
    bos_id: the token that starts a text, or None;
    eos_ids: the tokens that end an answer, from tokenizer_config.json and generation_config.json;
    names: special tokens by role, `bos_token` and `eos_token` among them even where they are None;
    chat_template: the source of the default one, or None;
    tool_template: the source of the chat template that shows tools, empty if there is no template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        names: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        """`names` are special tokens by role (`bos_token`, `eos_token`, ...), `templates` chat templates by name."""
        names, templates = names or {}, templates or {}
        backend.no_truncation()
        backend.no_padding()
        _declare_special(backend, names.values())
        self._backend = backend
        self._vocab = _Vocabulary(backend)
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self.bos_id = backend.token_to_id(names["bos_token"]) if "bos_token" in names else None
        named_eos = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
        self.eos_ids = tuple(dict.fromkeys([*([] if named_eos is None else [named_eos]), *eos_ids]))
        self.names: dict[str, str | None] = {"bos_token": None, "eos_token": None, **names}
        self.chat_template = templates.get("default")
        self.tool_template = templates.get("tool_use") or templates.get("default") or ""
        self._template = _chat_template(backend, templates, names) if templates else None

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a model folder's `tokenizer.json` and, where present, `tokenizer_config.json`,
        `special_tokens_map.json`, `generation_config.json`, `chat_template.jinja` and `additional_chat_templates/`.

        Nothing in the folder is executed but its chat template, in a sandbox. Raises InvalidCheckpoint, naming the
        file.
        """
        folder = Path(path)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        names = _token_names(_read_json(folder / "special_tokens_map.json")) | _token_names(config)
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        eos_ids = [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
        return cls(backend, names=names, templates=_templates(folder, config), eos_ids=eos_ids)

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: those that no text stands for."""
        return self._vocab.special

    @property
    def template_is_slow(self) -> bool:
        """Whether the chat template was once too slow for an event loop."""
        return self._template is not None and self._template.slow

    def encode(self, text: str, add_special: bool = True, *, max_tokens: int | None = None, param: str = "prompt") -> list[int]:
        """The ids of `text`; spellings of control tokens in it become control tokens.

        `add_special` adds what tokenizer.json wants at the ends of a text (often its `bos_id`). With `max_tokens` a text
        that is far too long for it raises ContextTooLong at once, without being encoded; the exact count is the
        caller's to check. A string that is no Unicode text raises InvalidRequest. Errors name `param`.
        """
        if max_tokens is not None and len(text) > max_tokens * CHARS_PER_TOKEN:
            raise ContextTooLong(f"the text has {len(text)} characters and cannot fit into {max_tokens} tokens", param=param)
        try:
            if len(text) > _LONG:
                return self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
            return self._backend.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            raise InvalidRequest("the text has an unpaired surrogate (half of a \\uD83D\\uDE00 pair)", param=param) from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that form no character become U+FFFD; ids beyond the vocabulary have no text."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text: possibly a part of a character; empty beyond the vocabulary."""
        return self._vocab.bytes_of(token)

    def token_text(self, token: int) -> str:
        """One token as text, with U+FFFD for parts of characters. Special tokens show their spelling."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """The ids of a conversation, by the model's chat template.

        A message has a `role` and `content`: a string, or a list of `{"type": "text", "text": ...}` parts, or None
        beside `tool_calls`. Control tokens come from the template alone: their spellings inside messages are plain
        text. `kwargs` are the switches of `chat_template.OPTIONS`. `max_tokens` bounds the size as in `encode`. Raises
        InvalidRequest with the template's own message when it refuses the conversation, and when the model has no
        template.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send a plain prompt, or put a chat_template.jinja into its folder",
                param="messages",
            )
        max_chars = DEFAULT_MAX_CHARS if max_tokens is None else max_tokens * CHARS_PER_TOKEN
        pieces = self._template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, options=kwargs, max_chars=max_chars
        )
        if max_tokens is not None and len(pieces) > max_tokens:
            raise ContextTooLong(f"the conversation cannot fit into {max_tokens} tokens", param="messages")
        # At a break a SentencePiece vocabulary adds a space, as it does at the start of any text.
        return [token for piece in pieces for token in self.encode(piece, add_special=False, param="messages")]

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for one answer to `prompt_ids`."""
        return Detokenizer(self._vocab, continues=len(prompt_ids) > 0, skip_special=skip_special)


class Detokenizer:
    """One output's text, token by token, in constant time a token. Not for two threads at once.

    Pushes and the flush together give `decode` of all pushed ids, also where the prompt ended inside a character, with two
    exceptions: the tags of tool calls are always shown, and with a SentencePiece vocabulary an answer that continues a prompt
    keeps the space before its first word, which `decode` takes for the start of a text.
    """

    def __init__(self, vocab: _Vocabulary, *, continues: bool, skip_special: bool) -> None:
        self._vocab = vocab
        self._skipped = vocab.special if skip_special else frozenset[int]()
        self._strip = vocab.strips_start and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._holds = False  # the first bytes of a character

    def push(self, token: int) -> str:
        """The text that `token` completes; a character whose last bytes are still to come is held back."""
        if token in self._skipped:
            return ""
        if not self._holds and not self._strip and (text := self._vocab.text_of(token)) is not None:
            return text
        data = self._vocab.bytes_of(token)
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        text = self._utf8.decode(data)
        self._holds = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """What is held back, as U+FFFD: nothing follows any more."""
        return self._utf8.decode(b"", final=True)


class _Vocabulary:
    """What each token adds to a text in bytes, for the two families of tokenizers that Sluice's architectures use.

    The family is found by asking the decoder, not by its name: byte-level BPE (GPT-2 alphabet) or SentencePiece with
    byte fallback. Raises InvalidCheckpoint for another.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._cache: dict[int, bytes] = {}  # at most the vocabulary; two threads may compute the same entry
        self._texts: dict[int, str | None] = {}  # the same of whole characters
        added = backend.get_added_tokens_decoder().items()
        self.special = frozenset(i for i, token in added if token.special and token.content not in _SHOWN)
        decoder = backend.decoder
        self.strips_start = False
        if decoder is not None and decoder.decode(["a", "Ġb"]) == "a b":
            self._bytes_in = _byte_level
        elif decoder is not None and decoder.decode(["a", "▁b"]) == "a b":
            self._bytes_in = _sentencepiece if decoder.decode(["<0x41>"]) == "A" else _metaspace
            self.strips_start = decoder.decode(["▁a"]) == "a"
        else:
            raise InvalidCheckpoint("tokenizer.json: its decoder is neither byte-level nor SentencePiece")

    def bytes_of(self, token: int) -> bytes:
        data = self._cache.get(token)
        if data is None:
            spelling = self._backend.id_to_token(token) if 0 <= token < 1 << 32 else None
            if spelling is None:
                return b""
            data = self._cache[token] = self._bytes_in(spelling)
        return data

    def text_of(self, token: int) -> str | None:
        """`bytes_of` as text; None unless they are whole characters."""
        try:
            return self._texts[token]
        except KeyError:
            data = self.bytes_of(token)
        try:
            text: str | None = data.decode()
        except UnicodeDecodeError:
            text = None
        if data:
            self._texts[token] = text
        return text


def _byte_alphabet() -> Iterator[tuple[str, int]]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the letters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((chr(byte), byte) for byte in printable)
    yield from ((chr(256 + index), byte) for index, byte in enumerate(others))


_BYTES = dict(_byte_alphabet())


def _byte_level(spelling: str) -> bytes:
    """The library decodes added tokens by the same rule, and as plain text where a letter is not of the alphabet."""
    try:
        return bytes(_BYTES[letter] for letter in spelling)
    except KeyError:
        return spelling.encode()


def _metaspace(spelling: str) -> bytes:
    return spelling.replace("▁", " ").encode()


def _sentencepiece(spelling: str) -> bytes:
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        try:
            return bytes([int(spelling[3:5], 16)])
        except ValueError:
            pass
    return _metaspace(spelling)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    if not file.is_file():
        raise InvalidCheckpoint(
            f"{file} is missing; transformers can write it: AutoTokenizer.from_pretrained(F).save_pretrained(F)"
        )
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InvalidCheckpoint(f"{file} is not a tokenizer: {str(error)[:300]}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; an empty one when there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{file} must contain a JSON object")
    return value


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a file writes each as a string or as an object with its `content`."""
    named = {}
    for key, value in config.items():
        spelling = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(spelling, str):
            named[key] = spelling
    return named


def _declare_special(backend: tokenizers.Tokenizer, spellings: Iterable[str]) -> None:
    """Tokens with a role are special even if tokenizer.json keeps them as ordinary vocabulary."""
    from tokenizers import AddedToken

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys(spellings) if text not in added and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in missing])


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name: files of their own before those inside tokenizer_config.json."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (own := folder / "chat_template.jinja").is_file():
        files["default"] = own
    if files:
        try:
            return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        except (OSError, ValueError) as error:
            raise InvalidCheckpoint(f"chat templates in {folder}: {error}") from error
    found = config.get("chat_template") or []
    named = [{"name": "default", "template": found}] if isinstance(found, str) else found
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in named}
    except (TypeError, KeyError) as error:
        raise InvalidCheckpoint(f"{folder / 'tokenizer_config.json'}: chat_template is malformed") from error


def _chat_template(backend: tokenizers.Tokenizer, templates: Mapping[str, str], names: Mapping[str, str]) -> ChatTemplate:
    added = backend.get_added_tokens_decoder().values()
    control = {token.content for token in added if token.special}
    # Some vocabularies do not declare the tokens that open a turn as special; they stand in the template all the same.
    written = "".join(templates.values())
    markup = {token.content for token in added if token.content in written and not token.content.isspace()}
    return ChatTemplate(templates, names, control, markup)
