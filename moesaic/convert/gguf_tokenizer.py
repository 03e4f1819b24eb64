"""Byte-level BPE tokenizers in GGUF metadata, and back.

A file names its pre-tokenizer instead of describing it; the names that are known here are in a table. SentencePiece
vocabularies are not read: their models come with a tokenizer.json too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from moesaic.data.tokenizer import CONFIG_NAME, GENERATION_NAME, Tokenizer
from moesaic.errors import ConversionError, DataError
from moesaic.logs import logger

# Token types of the format.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# The words of Llama 3 and Qwen2; they differ in how many digits stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# gpt-oss's words: capitals begin one.
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek-V3's, one after the other. Line ends stand in these as they are, as in the models' files.
_DEEPSEEK_WORDS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_SEED_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|"
    "\\s+(?!\\S)|\\s+"
)


@dataclass(frozen=True)
class _Rules:
    """What a pre-tokenizer's name stands for. splits: what is cut out, one after the other; none for GPT-2's words.

    ignores_merges: a word that is a token is that token, whatever the merges make of it. begins: whether llama.cpp puts
    the begin token before a text where the file does not say.
    """

    splits: tuple[str, ...] = ()
    is_digit_by_digit: bool = False
    is_composed: bool = False
    ignores_merges: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        first = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in self.splits]
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.is_digit_by_digit else []
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.splits)
        return pre_tokenizers.Sequence([*first, *digits, last]) if first or digits else last

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.is_composed else None


# Of names with the same rules the first is written.
_NAMES = {
    "gpt-2": _Rules(),
    "smollm": _Rules(is_digit_by_digit=True),
    "llama-bpe": _Rules((_WORDS.format(digits="{1,3}"),), ignores_merges=True, begins=True),
    "qwen2": _Rules((_WORDS.format(digits=""),), is_composed=True),
    "gpt-4o": _Rules((_CASED_WORDS,)),
    "deepseek-v3": _Rules(_DEEPSEEK_WORDS),
    "glm4": _Rules((_WORDS.format(digits="{1,3}"),), ignores_merges=True),
    "olmo": _Rules(is_composed=True),
    "seed-coder": _Rules((_SEED_WORDS,)),
}

# Beside the end that a file has one of: the end of a turn, and of a message to a tool.
_OTHER_ENDS = ("eot", "eom")


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Return the tokenizer that a file's metadata describes.

    Raises: DataError for a kind of tokenizer, or a pre-tokenizer, that is not known.
    """
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    rules = _NAMES.get(name) if isinstance(name, str) else None
    if kind != "gpt2" or rules is None:
        raise DataError(
            f"{where} has a tokenizer of kind {kind!r} with pre-tokenizer {name!r}; byte-level BPE ('gpt2') with one "
            f"of {', '.join(_NAMES)} is required; give the model's tokenizer.json with --tokenizer."
        )
    try:
        tokens = [str(each) for each in _list(metadata, "tokens")]
        merges = [tuple(str(each).split(" ", 1)) for each in _list(metadata, "merges", [])]
        types = [int(each) for each in _list(metadata, "token_type", [_NORMAL] * len(tokens))]
        if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} types")
        # Unused ones only fill the file up to the embeddings.
        vocabulary = {
            token: index for index, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != _UNUSED
        }
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignores_merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"{where} has a tokenizer that does not fit together ({error}); tokens, merges and types as llama.cpp "
            f"writes them are required; give the model's tokenizer.json with --tokenizer."
        ) from None
    inner.pre_tokenizer = rules.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    if rules.normalizer() is not None:
        inner.normalizer = rules.normalizer()
    special = [AddedToken(token, special=True, normalized=False) for token, type_ in _of(tokens, types, _CONTROL)]
    inner.add_special_tokens(special)
    inner.add_tokens([AddedToken(token, normalized=False) for token, _ in _of(tokens, types, _USER_DEFINED)])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {
        role: _role_id(metadata, role, len(tokens), where)
        for role in ("eos", "bos", "unknown", "padding", *_OTHER_ENDS)
    }
    for key, role in (("eos_token", "eos"), ("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if (index := ids[role]) is not None:
            config[key] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise DataError(
            f"{where} has a chat_template of type {type(template).__name__}; a text is required; give the model's "
            f"tokenizer.json with --tokenizer."
        )
    if template:
        config["chat_template"] = template
    companions = {CONFIG_NAME: json.dumps(config, ensure_ascii=False, indent=2) + "\n"}
    ends = {ids[role] for role in ("eos", *_OTHER_ENDS)}
    found = sorted(each for each in ends if each is not None)
    if len(found) > 1:
        companions[GENERATION_NAME] = json.dumps({"eos_token_id": found}) + "\n"
    values = json.loads(inner.to_str())
    values["post_processor"] = _template(metadata, rules, {index: token for token, index in vocabulary.items()}, where)
    return Tokenizer(json.dumps(values, ensure_ascii=False), companions=companions)


def _list(metadata: Mapping[str, Any], name: str, default: list[Any] | None = None) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list):
        raise ValueError(f"{name} is {'missing' if values is None else f'of type {type(values).__name__}'}")
    return values


def _role_id(metadata: Mapping[str, Any], role: str, num_tokens: int, where: str) -> int | None:
    """Return the token that a file names for a role; None, as llama.cpp has it, for what is no token's id."""
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if type(index) is int and 0 <= index < num_tokens:
        return index
    if index is not None:
        logger.warning(
            "%s names %.40r as its %s_token_id, which is no id of its %d tokens; the tokenizer goes without one.",
            where, index, role, num_tokens,
        )  # fmt: skip
    return None


def _template(
    metadata: Mapping[str, Any], rules: _Rules, tokens: Mapping[int, str], where: str
) -> dict[str, Any] | None:
    """Return the post-processor that puts a file's begin and end tokens around a text, None where it puts none.

    As JSON, because the library's class reads a meaning into a token's `$` and `:`.
    """
    around: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for role, found in around.items():
        is_added = metadata.get(f"tokenizer.ggml.add_{role}_token", role == "bos" and rules.begins)
        if is_added is False:
            continue
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if is_added is not True or type(index) is not int or index not in tokens:
            raise DataError(
                f"{where} puts its {role} token around a text (add_{role}_token is {is_added!r}), and {role}_token_id "
                f"is {index!r}; the id of a token is required; give the model's tokenizer.json with --tokenizer."
            )
        found.append((tokens[index], index))
    if not any(around.values()):
        return None
    before, behind = around["bos"], around["eos"]

    def sequence(letter: str, type_id: int) -> list[dict[str, Any]]:
        first, last = (
            [{"SpecialToken": {"id": token, "type_id": type_id}} for token, _ in each] for each in (before, behind)
        )
        return [*first, {"Sequence": {"id": letter, "type_id": type_id}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]} for token, index in (*before, *behind)
        },
    }


def _of(tokens: list[str], types: list[int], wanted: int) -> list[tuple[str, int]]:
    return [(token, type_) for token, type_ in zip(tokens, types, strict=True) if type_ == wanted]


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata that describes a tokenizer for a model with vocab_size embeddings.

    Raises: ConversionError for anything but byte-level BPE with a pre-tokenizer that has a name, and for what else of a
    tokenizer has no place there.
    """
    # As the library spells it, defaults and all.
    values = json.loads(tokenizers.Tokenizer.from_str(tokenizer.json_text).to_str())
    model = values["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConversionError(
            f"the tokenizer is {model.get('type')}; GGUF needs byte-level BPE here; export to Hugging Face's layout."
        )
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size} embeddings; each token needs "
            f"one; use the model's own tokenizer."
        )
    ids = dict(model["vocab"]) | {each["content"]: each["id"] for each in values.get("added_tokens", [])}
    tokens, types = [_filler(index, ids) for index in range(vocab_size)], [_UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for each in values.get("added_tokens", []):
        tokens[each["id"]] = each["content"]
        types[each["id"]] = _CONTROL if each["special"] else _USER_DEFINED
        if each["single_word"] or each["lstrip"] or each["rstrip"]:
            raise ConversionError(
                f"the tokenizer's token {each['content']!r} takes the spaces around it, or only whole words; GGUF has "
                f"no place for that; export to Hugging Face's layout."
            )
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name_of(values),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text_id,
    }
    names = tokenizer.special_names
    for key, role in (("eos_token", "eos"), ("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if names.get(key) in ids:
            metadata[f"tokenizer.ggml.{role}_token_id"] = ids[names[key]]
    metadata |= _added(tokenizer, metadata)
    others = sorted(tokenizer.stop_ids - {metadata["tokenizer.ggml.eos_token_id"]})
    if len(others) > len(_OTHER_ENDS):
        ends = ", ".join(tokens[each] for each in sorted(tokenizer.stop_ids))
        raise ConversionError(
            f"the tokenizer's files name {1 + len(others)} tokens that end a text ({ends}); GGUF has a place for "
            f"{1 + len(_OTHER_ENDS)} (eos, {', '.join(_OTHER_ENDS)}); take some out of {GENERATION_NAME}, or export to "
            f"Hugging Face's layout."
        )
    metadata |= {f"tokenizer.ggml.{role}_token_id": index for role, index in zip(_OTHER_ENDS, others, strict=False)}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _filler(index: int, taken: Mapping[str, int]) -> str:
    """Return the name of an id without a token; llama.cpp does not read a file with one name twice."""
    name = f"[PAD{index}]"
    while name in taken:
        name += "_"
    return name


def _added(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys for what the tokenizer's post-processor puts around a text."""
    plain, marked = (tokenizer.encode_prompt("a", add_special_tokens=each) for each in (False, True))
    bos, eos = (metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos"))
    before, behind = marked[:1] if bos is None else [bos], [eos]
    for has_bos, has_eos in product((False, True), repeat=2):
        if before * has_bos + plain + behind * has_eos == marked:
            found = {"tokenizer.ggml.add_bos_token": has_bos, "tokenizer.ggml.add_eos_token": has_eos}
            return {**found, "tokenizer.ggml.bos_token_id": before[0]} if has_bos else found
    raise ConversionError(
        f"the tokenizer's post-processor makes {' '.join(map(tokenizer.token, marked))!r} of 'a'; GGUF has a place for "
        f"one bos_token before a text and one eos_token behind it; export to Hugging Face's layout."
    )


def _name_of(values: Mapping[str, Any]) -> str:
    own = _rules(values)
    for name, rules in _NAMES.items():
        probe = tokenizers.Tokenizer(models.BPE(ignore_merges=rules.ignores_merges))
        probe.pre_tokenizer = rules.pre_tokenizer()
        probe.decoder = decoders.ByteLevel()
        if rules.normalizer() is not None:
            probe.normalizer = rules.normalizer()
        if _rules(json.loads(probe.to_str())) == own:
            return name
    raise ConversionError(
        f"the tokenizer's rules (normalizer, pre-tokenizer, merges) have no name in GGUF that is known here; those of "
        f"one of {', '.join(_NAMES)} are required; export to Hugging Face's layout."
    )


def _rules(values: Mapping[str, Any]) -> list[Any]:
    """What a pre-tokenizer's name has to stand for: all but the vocabulary."""
    model = values["model"]
    affixes = [model.get(name) or None for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    decoder = (values.get("decoder") or {}).get("type")
    own = [_essence(values.get(name)) for name in ("normalizer", "pre_tokenizer")]
    if own[0] == {"type": "Sequence", "normalizers": []}:  # as DeepSeek's files say none
        own[0] = None
    return [*own, decoder, bool(model.get("ignore_merges")), *affixes]


def _essence(value: Any) -> Any:
    """A pre-tokenizer's JSON without what changes no token."""
    if isinstance(value, dict):
        return {key: _essence(each) for key, each in value.items() if key != "trim_offsets"}
    return [_essence(each) for each in value] if isinstance(value, list) else value
