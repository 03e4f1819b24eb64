"""The tokenizer: byte-level BPE of our own training, or a given one, over the `tokenizers` library.

Here: loading, training, encoding, the end-of-text token, the fingerprint; the files that come with a given tokenizer
(special tokens, chat template) are kept and written again as they are. Applying a chat template is in chat.py.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from moesaic.data.cut import cut_text
from moesaic.environment import environment
from moesaic.errors import DataError
from moesaic.folders import write_whole

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_SAMPLE_BYTES = 32 * 2**20
TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
GENERATION_NAME = "generation_config.json"
# What tells other tools, and a chat, more of a tokenizer than its vocabulary.
COMPANION_NAMES = (
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_NAME,
    GENERATION_NAME,
)
_MAX_COMPANION_BYTES = 16 << 20

# Of tokenizers that lack <|endoftext|>: what Llama 1 and 2, Mistral, Llama 3, Gemma, BERT-like and T5 ones use.
_COMMON_END_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<|eot_id|>", "<|im_end|>")
# The 256 bytes and the end-of-text token.
MIN_VOCAB_SIZE = 257
# How byte-level BPE writes bytes: printable characters as themselves, the others as those from 256 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_LETTERS = frozenset(_BYTE_OF)
_TO_BYTES = str.maketrans({letter: chr(byte) for letter, byte in _BYTE_OF.items()})
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# The trainer keeps 256 texts at a time, whatever their length; short ones bound what it holds.
_TRAIN_PIECE_CHARS = 16 * 1024
# A longer text takes long enough for others to wait: it is encoded beside them.
SHORT_CHARS = 4096


class Tokenizer:
    """Text to token ids and back. Special tokens written out in a text are encoded as the plain text they are."""

    def __init__(self, json_text: str, *, companions: Mapping[str, str] | None = None) -> None:
        """Make one from the text of a tokenizer.json, and of the files that came with it, by COMPANION_NAMES."""
        self._text, self._companions = json_text, dict(companions or {})
        values = _parse(json_text)
        # A stored truncation would silently cut documents, a stored padding would add tokens to them.
        values["truncation"] = values["padding"] = None
        self._json = json.dumps(values, ensure_ascii=False)
        try:
            self._inner = tokenizers.Tokenizer.from_str(self._json)
        except BaseException as error:  # the library raises a bare Exception for a bad file, or panics
            if not _is_of_library(error):
                raise
            raise DataError(
                f"the tokenizer file does not describe a tokenizer ({error}); a tokenizer.json as the `tokenizers` "
                f"library writes it is required; export it again from where it came."
            ) from None
        # Ids may have gaps: what a model needs is an embedding for the highest.
        self._vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        self._ends()  # what is wrong with them is said now, not when a model is to stop
        configured = self._configured("eos_token")
        self._end_of_text, self._end_of_text_id = self._find_end_of_text(configured)
        added = self._inner.get_added_tokens_decoder().get(self._end_of_text_id)
        if added is not None and not added.special:
            # Only special tokens can be switched off while encoding, and a text must never end itself.
            self._inner.add_special_tokens([AddedToken(self._end_of_text, special=True, normalized=False)])
        self._inner.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json, or the one in a Hugging Face, prepared or run folder.

        Raises: DataError when there is none, it cannot be read, or it has no end-of-text token.
        """
        given = Path(path)
        file = given / TOKENIZER_NAME if given.is_dir() else given
        if not file.is_file():
            raise DataError(
                f"{given} holds no tokenizer; a {TOKENIZER_NAME}, or a folder with one (Hugging Face, prepared or run "
                f"folder), is required; check the path, or put the file there."
            )
        try:
            return cls(_read(file), companions=_read_companions(file.parent))
        except OSError as error:
            raise DataError(
                f"{error.filename or file} cannot be read ({error.strerror or error}); a {TOKENIZER_NAME} and what "
                f"stands beside it are required; check its permissions."
            ) from None
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int = DEFAULT_VOCAB_SIZE, sample_bytes: int = DEFAULT_SAMPLE_BYTES
    ) -> "Tokenizer":
        """Train a byte-level BPE with <|endoftext|> on the first `sample_bytes` (UTF-8) of the texts.

        Every text can be encoded and decoded exactly. A small sample may give fewer than `vocab_size` tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(
                f"vocab_size ({vocab_size}) is too small; a byte-level tokenizer needs the 256 bytes and "
                f"{END_OF_TEXT}; use at least {MIN_VOCAB_SIZE}."
            )
        if sample_bytes < 1:
            raise DataError(f"sample_bytes ({sample_bytes}) is not positive; training needs text; use 1000000 or more.")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        sample = _Sample(texts, sample_bytes)
        # All cores train it, whatever a launcher has set for encoding.
        with environment("TOKENIZERS_PARALLELISM", "true"):
            inner.train_from_iterator(iter(sample), trainer)
        if sample.used_bytes == 0:
            raise DataError("the sample to train a tokenizer on is empty; some text is required; check the sources.")
        return cls(inner.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any begin or end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any begin or end token."""
        try:
            found = [each.ids for each in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            raise _said(error, "encode a text") from None
        return [self._spelled(ids) if self._end_of_text_id in ids else ids for ids in found]

    def _spelled(self, ids: list[int]) -> list[int]:
        """Return ids with the end-of-text token's letters in its place: the model's own vocabulary has it as a word.

        Raises: DataError where a letter is one too.
        """
        end, model = self._end_of_text_id, self._inner.model
        try:
            letters = [part.id for letter in self._end_of_text for part in model.tokenize(letter)]
        except BaseException as error:
            raise _said(error, "encode a text") from None
        if end in letters:
            raise DataError(
                f"the tokenizer encodes plain text as its end-of-text token {self._end_of_text!r}; a text must not end "
                f"itself; use a tokenizer with another token for what it does not know."
            )
        return [part for each in ids for part in (letters if each == end else [each])]

    def encode_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text that a template made: special tokens written out in it are themselves.

        add_special_tokens: put before and behind it what the tokenizer's own post-processor puts there (a begin token,
        say, or nothing).
        """
        try:
            if len(text) < SHORT_CHARS:
                return list(self._marking.encode(text, add_special_tokens=add_special_tokens).ids)
            # As a batch of one: other threads run meanwhile, which they do not beside a single text.
            (encoding,) = self._marking.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoding.ids)
        except BaseException as error:
            raise _said(error, "encode a prompt") from None

    @cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer.from_str(self._json)
        inner.encode_special_tokens = False
        return inner

    @cached_property
    def may_be_cut(self) -> bool:
        """Whether pieces of a text, cut as cut.py does, have the tokens of the whole before words, elsewhere its text.

        Not where each piece's beginning is marked, as by a normalizer that prepends `▁`, or tokens go over spaces.
        """

        def both(first: str, second: str) -> tuple[list[int], list[int]]:
            return self.encode(first) + self.encode(second), self.encode(first + second)

        words = (both("one", " two"), both("one ", " two"))
        others = (both("one", "\ntwo"), both("on", "e"))
        return all(apart == whole for apart, whole in words) and all(
            self.decode(apart) == self.decode(whole) for apart, whole in others
        )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids; special tokens appear as their names, or not at all."""
        numbers = [int(each) for each in ids]
        try:
            return str(self._inner.decode(numbers, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise _said(error, "make a text of tokens") from None

    def token(self, token_id: int) -> str:
        """Return one token as the vocabulary spells it."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            raise DataError(
                f"token id {token_id} is not in the vocabulary; ids from 0 to {self._vocab_size - 1} are required; "
                f"check that text and tokenizer belong together."
            )
        return str(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to a text that goes on; none for special and unknown ones.

        They may be part of a character. A decoder that strips the space before a text's first word does so there only.
        """
        name = self._inner.id_to_token(token_id)
        if name is None or token_id in self.special_ids:
            return b""
        if self.is_byte_level:
            # A token that was added as plain text is spelled as it is.
            is_spelled = _LETTERS.issuperset(name)
            return name.translate(_TO_BYTES).encode("latin-1") if is_spelled else str(name).encode("utf-8")
        if self.has_byte_tokens and _BYTE_TOKEN.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        before = self.decode([self._letter_id])
        return self.decode([self._letter_id, token_id]).removeprefix(before).encode("utf-8")

    def is_byte_token(self, token_id: int) -> bool:
        """Whether a token is one byte, which makes a character only with its neighbours."""
        name = self._inner.id_to_token(token_id) if self.has_byte_tokens else None
        return name is not None and _BYTE_TOKEN.fullmatch(name) is not None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are no text: what skip_special_tokens leaves out."""
        return frozenset(
            token_id for token_id, token in self._inner.get_added_tokens_decoder().items() if token.special
        )

    @property
    def added_names(self) -> frozenset[str]:
        """The tokens that were added to the model's vocabulary, special or not: what a prompt that spells them has."""
        return frozenset(token.content for token in self._inner.get_added_tokens_decoder().values())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a text is its tokens' bytes one after another, and nothing else."""
        return self._decoders == ["ByteLevel"]

    @cached_property
    def has_byte_tokens(self) -> bool:
        """Whether tokens named <0x00> to <0xFF> stand for bytes, as SentencePiece's do."""
        return "ByteFallback" in self._decoders

    @cached_property
    def _decoders(self) -> list[str]:
        decoder = json.loads(self._json).get("decoder") or {}
        return [each["type"] for each in decoder.get("decoders", [decoder]) if "type" in each]

    @cached_property
    def _letter_id(self) -> int:
        """A token that is plain text in the middle of a text, to see what another adds to it."""
        plain = (each for each in sorted(self._inner.get_vocab().items(), key=lambda item: item[1]))
        return next((token_id for name, token_id in plain if name.isascii() and name.isalpha()), self._end_of_text_id)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included."""
        return self._vocab_size

    @property
    def end_of_text(self) -> str:
        return self._end_of_text

    @property
    def end_of_text_id(self) -> int:
        return self._end_of_text_id

    @property
    def begin_of_text_id(self) -> int | None:
        """The bos_token of the tokenizer's own files, None where they name none."""
        name = self._configured("bos_token")
        return None if name is None else self._inner.token_to_id(name)

    @cached_property
    def first_id(self) -> int:
        """The token that stands before a text: what the tokenizer's own post-processor puts there, as a rule its begin
        token, and where it puts nothing, the end-of-text token, which ends the text before."""
        marked, plain = (self.encode_prompt("a", add_special_tokens=each) for each in (True, False))
        return self._end_of_text_id if marked[:1] == plain[:1] else marked[0]

    @property
    def special_names(self) -> dict[str, str]:
        """The names of begin, end and the like as the tokenizer's own files give them, by their keys there."""
        names = {key: self._configured(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {key: name for key, name in names.items() if name is not None}

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end what a model says: the end of text, and what the tokenizer's own files call so."""
        names = {self._end_of_text, self._configured("eos_token")}
        found = {self._inner.token_to_id(name) for name in names if name is not None}
        found |= set(self._ends())
        return frozenset(each for each in found if each is not None and 0 <= each < self._vocab_size)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that makes one text of a conversation, None where there is none."""
        file = self._companions.get(TEMPLATE_NAME)
        if file is not None:
            return file
        value = self._companion(CONFIG_NAME).get("chat_template")
        if isinstance(value, list):  # several by name, of which the default one is meant where none is named
            named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
            value = named.get("default")
        return value if isinstance(value, str) else None

    @property
    def chat_template_file(self) -> str:
        """The name of the file that holds the template."""
        return TEMPLATE_NAME if TEMPLATE_NAME in self._companions else CONFIG_NAME

    @property
    def fingerprint(self) -> str:
        """The sha256 of the tokenizer's JSON in canonical form: the same for every copy, however it is formatted.

        A template that adds no token counts as none: transformers saves one where there was none.
        """
        values = json.loads(self._json)
        if _adds_nothing(values.get("post_processor")):
            values["post_processor"] = None
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def json_text(self) -> str:
        """The tokenizer.json that gives this tokenizer again, with its companions: as it was given."""
        return self._text

    @property
    def companions(self) -> dict[str, str]:
        """The texts of the files that came with it, by COMPANION_NAMES."""
        return dict(self._companions)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json to a file or into a folder, and beside it the files that came with it.

        Where none came, tokenizer_config.json is made and names the end-of-text token.
        """
        given = Path(path)
        file = given / TOKENIZER_NAME if given.is_dir() or not given.suffix else given
        file.parent.mkdir(parents=True, exist_ok=True)
        for name, text in self._beside().items():
            write_whole(file.parent / name, text)
        write_whole(file, self._text)

    def would_replace(self, folder: Path) -> str | None:
        """Return the name of a file in a folder that save() would change; None where it would change none."""
        for name, text in {TOKENIZER_NAME: self._text, **self._beside()}.items():
            file = folder / name
            if file.exists() and (not file.is_file() or file.read_bytes() != text.encode()):
                return name
        return None

    def _beside(self) -> dict[str, str]:
        """What is written beside tokenizer.json, by its name."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_of_text}
        return {CONFIG_NAME: json.dumps(config, ensure_ascii=False, indent=2) + "\n", **self._companions}

    def _configured(self, key: str) -> str | None:
        """Return a text of tokenizer_config.json; a token may be written as an object with its `content`."""
        value = self._companion(CONFIG_NAME).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _ends(self) -> list[int]:
        """Return the ids of the tokens that generation_config.json says a model stops at."""
        given = self._companion(GENERATION_NAME).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(each) is int for each in ids):
            raise DataError(
                f"{GENERATION_NAME} has the eos_token_id {given!r:.80}; the id of a token, or a list of ids, is "
                f"required, or a model would not stop there; mend or remove it."
            )
        return ids

    def _companion(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._companions.get(name, "{}"))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise DataError(
                f"{name} is not a JSON object; one as transformers writes it is required; mend or remove it."
            )
        return values

    def _find_end_of_text(self, configured: str | None) -> tuple[str, int]:
        for name in (END_OF_TEXT, configured, *_COMMON_END_NAMES):
            token_id = None if name is None else self._inner.token_to_id(name)
            if name is not None and token_id is not None:
                return name, token_id
        raise DataError(
            f"the tokenizer has no end-of-text token; one that ends each document is required: {END_OF_TEXT}, the "
            f"eos_token of {CONFIG_NAME}, or one of {', '.join(_COMMON_END_NAMES)}; add {END_OF_TEXT} to its "
            f"added_tokens, or put {CONFIG_NAME} with eos_token beside it."
        )


def _is_of_library(error: BaseException) -> bool:
    """Whether an error is the library's word of a file: a bare Exception, or a panic, which is none that Python has."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _said(error: BaseException, doing: str) -> BaseException:
    """Return what to raise for an error of the library, and any other as it is."""
    if not _is_of_library(error):
        return error
    return DataError(
        f"the tokenizer cannot {doing} ({error}); a tokenizer.json whose parts fit together is required; export it "
        f"again from where it came."
    )


def _adds_nothing(post_processor: dict[str, Any] | None) -> bool:
    """Whether it is a template of the texts alone, in their order."""
    if post_processor is None or post_processor.get("type") != "TemplateProcessing":
        return False
    texts = [[piece.get("Sequence", {}).get("id") for piece in post_processor[key]] for key in ("single", "pair")]
    return texts == [["A"], ["A", "B"]]


class _Sample:
    """The first bytes of some texts, in short pieces, counting what was used."""

    def __init__(self, texts: Iterable[str], limit_bytes: int) -> None:
        self._texts = texts
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for piece in cut_text(text, _TRAIN_PIECE_CHARS):
                data = piece.encode("utf-8", "replace")[: self._limit_bytes - self.used_bytes]
                self.used_bytes += len(data)
                yield data.decode("utf-8", "ignore")
                if self.used_bytes >= self._limit_bytes:
                    return


def _parse(json_text: str) -> dict[str, Any]:
    try:
        values = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the tokenizer file is not JSON ({error}); a tokenizer.json as the `tokenizers` library writes it is "
            f"required; a SentencePiece or tiktoken file must be converted first."
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError(
            "the tokenizer file has no `model`; a tokenizer.json as the `tokenizers` library writes it is required; "
            "vocab.json or encoder.json alone do not do."
        )
    return values


def _read_companions(folder: Path) -> dict[str, str]:
    texts = {}
    for name in COMPANION_NAMES:
        file = folder / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MAX_COMPANION_BYTES:
            raise DataError(
                f"{file} has {file.stat().st_size} bytes; at most {_MAX_COMPANION_BYTES} are read; a file as "
                f"transformers writes it is required; mend or remove it."
            )
        texts[name] = _read(file)
    return texts


def _read(file: Path) -> str:
    """Return the text of a file, whose line ends stay what they are."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(
            f"{file.name} is not UTF-8 text; a file as the tokenizers library and transformers write it is required; "
            f"check the path."
        ) from None
