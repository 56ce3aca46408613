"""The tokenizer of a model: text to ids, ids to text, messages to ids.

BPE by the `tokenizers` library, over bytes or as SentencePiece has it. Where vocabularies come from
is in `gguf_vocabulary`, `folder_vocabulary` and `llama2c_vocabulary`; how messages are kept from
forging special tokens is in `placeholders`.
"""

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from roofline.errors import CheckpointError, RequestError
from roofline.sandbox import Sandbox
from roofline.tokenizer.chat_template import ChatTemplate, Renderer
from roofline.tokenizer.conversation import Conversation
from roofline.tokenizer.folder_vocabulary import vocabulary_from_folder
from roofline.tokenizer.gguf_vocabulary import vocabulary_from_gguf
from roofline.tokenizer.llama2c_vocabulary import vocabulary_from_llama2c
from roofline.tokenizer.placeholders import SpecialTexts, render_untrusted
from roofline.tokenizer.vocabulary import Vocabulary

_MAX_SPECIAL_CHARACTERS = 1024

# How much text a chat template may write.
_BYTES_PER_TOKEN = 16
_USUAL_CONTEXT_TOKENS = 1 << 17  # where the files do not say
_MAX_CONTEXT_TOKENS = 1 << 21


class Tokenizer:
    """Encodes and decodes for one model. Safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.kind = vocabulary.kind
        self.vocab_size = vocabulary.size
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_ids = vocabulary.eos_token_ids
        self.adds_bos = vocabulary.bos_token_id in vocabulary.prefix
        self._prefix, self._suffix = vocabulary.prefix, vocabulary.suffix
        self._parsing = vocabulary.bpe  # finds special tokens in a text
        self._plain = _without_specials(vocabulary.bpe)  # takes them for text
        self._plain_within = _within_text(self._plain)  # for text that follows other text
        self._piece_bytes = vocabulary.piece_bytes
        self._leads_with_space = vocabulary.leads_with_space
        added = vocabulary.bpe.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_texts = {id: token.content for id, token in added.items()}
        self._special_texts = _special_texts(vocabulary, added.values())
        self._template_tokens = vocabulary.template_tokens
        self._source = vocabulary.source
        self._renderer = Renderer(Sandbox(), _max_chat_bytes(vocabulary.context_tokens))
        self.chat_template: ChatTemplate | None = None
        if vocabulary.chat_templates:
            origin = f"{vocabulary.source}: chat template"
            self.chat_template = ChatTemplate(vocabulary.chat_templates, origin)
            self._renderer.start()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], source: str) -> Self:
        """Build from GGUF metadata; `source` is the file's name for messages."""
        return cls(vocabulary_from_gguf(metadata, source))

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Build from the tokenizer.json of a model folder and the files beside it."""
        return cls(vocabulary_from_folder(path))

    @classmethod
    def from_llama2c(cls, path: str | os.PathLike[str]) -> Self:
        """Build from llama2.c's tokenizer.bin."""
        return cls(vocabulary_from_llama2c(path))

    def with_chat_template(self, template: ChatTemplate) -> Self:
        """The same tokenizer, whose chats another template writes."""
        other = copy.copy(self)
        other.chat_template = template
        other._renderer.start()  # the same: one process serves both
        return other

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turn text into ids, with a BOS where the model wants one.

        A special token's name in the text is text, unless `parse_special` asks for the token.
        """
        ids = self._parse(text) if parse_special else self._encode_text(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids that begin a text into it; bytes that are no UTF-8 become U+FFFD."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(id) for id in ids if id not in hidden)
        return self.without_lead(data).decode("utf-8", "replace")

    def without_lead(self, data: bytes) -> bytes:
        """The bytes of the ids that begin a text, without a space that is of the encoding only."""
        return data.removeprefix(b" ") if self._leads_with_space else data

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for, which may be a part of a character."""
        if not 0 <= id < self.vocab_size:
            raise RequestError(
                f"token id {id} is outside the vocabulary: ids are 0 to {self.vocab_size - 1}"
            )
        added = self._added_texts.get(id)
        if added is not None:
            return added.encode()
        return self._piece_bytes(self._plain.id_to_token(id) or "")  # a folder's may have holes

    def token_text(self, id: int) -> str:
        """A token as text to show by itself; U+FFFD for parts of characters."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Turn a conversation into ids; special tokens are those the template writes, no others.

        It ends where the assistant begins to answer, unless told otherwise or the final message is
        to be continued.
        """
        conversation = Conversation(
            messages, add_generation_prompt, continue_final_message, tools, documents, variables
        )
        pieces = self._render(conversation)
        if len(pieces) == 1:
            return self._parse(pieces[0])
        ids: list[int] = []
        text = ""
        for part in self._parts(pieces):
            if isinstance(part, str):
                text += part
            else:
                ids += [*self._encode_text(text, within=bool(ids)), part]
                text = ""
        return ids + self._encode_text(text, within=bool(ids))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the template writes it, to show; see `apply_chat_template`."""
        conversation = Conversation(
            messages, add_generation_prompt, continue_final_message, tools, documents, variables
        )
        return "".join(self._render(conversation))

    def close(self) -> None:
        """End the process that renders chat templates; a later chat would start another."""
        self._renderer.sandbox.close()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `from_folder` builds this tokenizer again."""
        whole = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        if whole.post_processor is None and (self._prefix or self._suffix):  # a GGUF's
            around = {id: self.token_text(id) for id in (*self._prefix, *self._suffix)}
            before, after = ([around[id] for id in ids] for ids in (self._prefix, self._suffix))
            whole.post_processor = TemplateProcessing(
                single=[*before, "$A", *after], special_tokens=[(t, id) for id, t in around.items()]
            )
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._template_tokens,
        }
        if self.chat_template is not None:
            sources = self.chat_template.sources
            config["chat_template"] = sources.get("default", "")
            if set(sources) != {"default"}:
                config["chat_template"] = [{"name": n, "template": t} for n, t in sources.items()]
        Path(folder, "tokenizer.json").write_text(whole.to_str(), encoding="utf-8")
        text = json.dumps(config, indent=2)
        Path(folder, "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _render(self, conversation: Conversation) -> list[str]:
        """The template's text, and at odd indices texts of special tokens that callers wrote."""
        template = self.chat_template
        if template is None:
            raise RequestError(
                f"{self._source}: has no chat template; give one with --chat-template "
                "(chat_template= in Python), or a plain prompt"
            )
        template.refuse_unused(conversation.optional)
        return render_untrusted(
            partial(template.render, renderer=self._renderer),
            self._special_texts,
            {"messages": conversation.plain_messages(), **conversation.optional},
            {"add_generation_prompt": conversation.generation_prompt, **self._template_tokens},
            continue_final_message=conversation.continue_final_message,
        )

    def _parts(self, pieces: Sequence[str]) -> Iterator[str | int]:
        """Cut rendered pieces into plain text and the ids of the template's special tokens."""
        for index, piece in enumerate(pieces):
            start = 0
            if piece and index % 2 == 0:
                encoding = _encoding(self._parsing, piece)
                for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                    if id in self.special_ids:
                        yield piece[start:begin]
                        yield id
                        start = end
            yield piece[start:]

    def _parse(self, text: str) -> list[int]:
        return _encoding(self._parsing, text).ids

    def _encode_text(self, text: str, *, within: bool = False) -> list[int]:
        ids = _encoding(self._plain_within if within else self._plain, text).ids
        if not self.special_ids.isdisjoint(ids):  # a vocabulary whose merges make a special token
            token = next(id for id in ids if id in self.special_ids)
            raise RequestError(
                f"the text encodes to the special token {self.token_text(token)!r}, "
                "which text of a request may not"
            )
        return ids


def _max_chat_bytes(context_tokens: int | None) -> int:
    """More text than a context holds, of any but odd text."""
    tokens = min(max(context_tokens or _USUAL_CONTEXT_TOKENS, 1), _MAX_CONTEXT_TOKENS)
    return _BYTES_PER_TOKEN * tokens


def _special_texts(vocabulary: Vocabulary, added: Iterable[tokenizers.AddedToken]) -> SpecialTexts:
    texts = [token.content for token in added if token.special]
    longest = max(map(len, texts), default=0)
    if longest > _MAX_SPECIAL_CHARACTERS:  # every message is searched for pieces of all of them
        raise CheckpointError(
            f"{vocabulary.source}: a special token is {longest} characters long; "
            f"at most {_MAX_SPECIAL_CHARACTERS} are supported"
        )
    return SpecialTexts(texts)


def _without_specials(bpe: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, sharing its vocabulary, for which special tokens' texts are text."""
    plain = tokenizers.Tokenizer(bpe.model)
    plain.normalizer = bpe.normalizer
    plain.pre_tokenizer = bpe.pre_tokenizer
    plain.add_tokens([token for _, token in sorted(bpe.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = True
    return plain


def _within_text(plain: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, for text before which something stands.

    It differs where a space goes before the first word only; the library cannot know of what was
    encoded before.
    """
    words = plain.pre_tokenizer
    if not isinstance(words, pre_tokenizers.Metaspace) or words.prepend_scheme != "first":
        return plain
    within = _without_specials(plain)
    within.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=words.replacement, prepend_scheme="never", split=words.split
    )
    return within


def _encoding(bpe: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """Encode, unless the text cannot be; an interrupt goes its way."""
    try:
        # A batch of one: `encode` would hold up every other thread until it is done.
        return bpe.encode_batch([_checked(text)], add_special_tokens=False)[0]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library's Rust, which has no class
            raise
    raise RequestError(
        f"the text of {len(text)} characters cannot be cut into words: some run of it takes more "
        "than the 10 million tries there are for one word; give it in parts"
    )


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"the text is {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds half a surrogate pair at character {error.start}; "
            "it must be valid Unicode"
        ) from None
    return text
