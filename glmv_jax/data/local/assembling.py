"""Records to documents: tokens, loss weights and patches of one row at most.

A document is `[gMASK]<sop>`, its segments as they come, `<|endoftext|>`; a conversation is `conversation.render`'s. A
film is the images of its groups of frames, each with its time.

What is longer than a row (in tokens, patches or learnt tokens) is treated as its source's `long` says:

    split   a document: in parts, each as long as a row allows, none of which cuts through an image; they are documents
            of their own, so none sees another. Parts in which nothing is learnt are left out.
            A conversation: as with "cut", for a turn says little without those before it.
    cut     a document ends where the row does, a conversation after the last answer that the row holds; one whose
            first answer it does not hold is dropped.
    drop    the record is left out, and its id logged.

The first document of a record that was split or cut says so (`Document.trimmed`), and training counts it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from glmv_jax.data import conversation, video
from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.chat import Rendered, Writer
from glmv_jax.data.dialect import COMPACT, Dialect
from glmv_jax.data.faults import FaultLog, LeftOut
from glmv_jax.data.local.schema import Media, Record, Text
from glmv_jax.data.naflex import load_image
from glmv_jax.data.pairs.balance import Ref
from glmv_jax.typing import UserError

HEAD = ("[gMASK]", "<sop>")
Image = tuple[np.ndarray, np.ndarray]  # patches, yx


@dataclasses.dataclass(frozen=True)
class Assembler:
    """Record -> documents.

    builder: vocabulary, patches and the budgets of a row.   long: see above.   thinking: see `conversation.render`.
    film_patches: of a group of frames at most.              film_frames: of a film at most.
    name: of the source.                                     log: where a record that is dropped is named.
    dialect: of conversations.
    """

    builder: DocumentBuilder
    long: str = "split"
    thinking: str = "last"
    film_patches: int = 256
    film_frames: int = 64
    name: str = "documents"
    log: FaultLog = dataclasses.field(default_factory=FaultLog)
    dialect: Dialect = COMPACT

    def __post_init__(self) -> None:
        conversation.check_rule(self.thinking)

    def __call__(self, ref: Ref, rng: np.random.Generator) -> list[Document]:
        """Reads a record and makes its documents. LeftOut for one that is dropped."""
        record = ref.reader[ref.index]
        documents = self.documents(record)
        if not documents:
            b = self.builder
            row = f"a row of {b.max_tokens} tokens and {b.max_patches} patches"
            reason = f"longer than {row}, or nothing of it is learnt"
            self.log.add(self.name, ref.id, f"{reason}: dropped", ref.index)
            raise LeftOut(reason)
        return [dataclasses.replace(document, source=self.name) for document in documents]

    def documents(self, record: Record) -> list[Document]:
        """At least one document; none for a record that is too long and to be dropped, or teaches nothing."""
        if record.messages:
            return self._conversations(record)
        shown = [None if isinstance(segment, Text) else self._seen(segment) for segment in record.segments]
        images = tuple(image for each in shown if each for _, image in each)
        rendered = self._written(record, shown)
        whole = self.builder.finished(rendered, images, record.id)
        if not self.builder.too_long(whole):
            return [whole] if whole.targets else []
        if self.long == "drop":
            return []
        parts = self._parts(rendered, images, record.id)
        return _said_once(parts if self.long == "split" else parts[:1], self.long)

    def _conversations(self, record: Record) -> list[Document]:
        """Of a conversation, or of each turn of it (`conversation.turns`)."""
        parts = conversation.turns(record.messages) if self.thinking == "each" else [record.messages]
        seen = [self._seen(media) for media in record.media]
        made = []
        for number, messages in enumerate(parts):
            id_ = record.id if len(parts) == 1 else f"{record.id}@{number}"
            made += self._conversation(dataclasses.replace(record, id=id_, messages=tuple(messages)), seen)
        return _said_once(made, "cut") if 0 < len(made) < len(parts) else made

    def _conversation(self, record: Record, seen: Sequence[list[tuple[float, Image]]]) -> list[Document]:
        ends = [n + 1 for n, message in enumerate(record.messages) if message["role"] == "assistant"]
        for kept in reversed(ends):  # what follows the last answer is learnt by nobody
            messages = record.messages[:kept]
            part = seen[: sum(p["type"] != "text" for message in messages for p in message["content"])]
            tokens = [self._tokens(media, each) for media, each in zip(record.media, part)]
            rendered = conversation.render(messages, self.builder.tokenizer, tokens, record.tools, self.thinking,
                                           self.dialect)
            rendered = dataclasses.replace(rendered, loss_weight=rendered.loss_weight * np.float32(record.weight))
            images = tuple(image for each in part for _, image in each)
            document = self.builder.finished(rendered, images, record.id)
            if not self.builder.too_long(document):
                whole = [document] if kept == ends[-1] else _said_once([document], "cut")
                return whole if document.targets else []
            if self.long == "drop":
                break
        return []

    # ------------------------------------------------------------------------------------------------- pictures, tokens
    def _seen(self, media: Media) -> list[tuple[float, Image]]:
        """The image of a picture, or those of a film's groups of frames with their times."""
        patcher = self.builder.patcher
        if media.kind == "image":
            return [(0.0, patcher(load_image(media.content)))]
        if patcher.frames != patcher.temporal:
            raise UserError("it has a film, for which rows have no room; set data.video=True")
        patcher = dataclasses.replace(patcher, max_patches=self.film_patches)
        sample = functools.partial(video.sampled, most=self.film_frames, group=patcher.frames)
        groups = video.frame_groups(media.content, sample, patcher.frames)
        return [(at, patcher.moving(frames)) for at, frames in groups]

    def _tokens(self, media: Media, seen: Sequence[tuple[float, Image]]) -> int | conversation.Film:
        merge = self.builder.patcher.merge**2
        counts = [(at, len(patches) // merge) for at, (patches, _) in seen]
        return counts[0][1] if media.kind == "image" else counts

    def _written(self, record: Record, shown: Sequence[list | None]) -> Rendered:
        writer, tokenizer = Writer(self.builder.tokenizer), self.builder.tokenizer
        writer.special(*HEAD)
        for segment, seen in zip(record.segments, shown):
            if isinstance(segment, Text):
                writer.ids(tokenizer.encode(segment.text), segment.loss * record.weight)
                continue
            tokens = self._tokens(segment, seen or ())
            if isinstance(tokens, int):
                writer.image(tokens)
            else:
                conversation.write_film(writer, tokenizer, tokens)
        writer.special("<|endoftext|>", weight=record.weight)
        return writer.done()

    # ------------------------------------------------------------------------------------------------- parts of a row
    def _parts(self, rendered: Rendered, images: Sequence[Image], id_: str) -> list[Document]:
        """A long text in parts that fit a row, in order; UserError when an image alone does not."""
        made = []
        for number, (start, stop) in enumerate(self._cuts(rendered, images)):
            here = np.r_[: len(HEAD), start:stop]
            of = rendered.image_of_token[here]
            first = int(of[of >= 0].min(initial=len(images)))
            part = Rendered(rendered.tokens[here], rendered.loss_weight[here], np.where(of >= 0, of - first, -1))
            own = tuple(images[first : int(of.max()) + 1]) if (of >= 0).any() else ()
            made.append(self.builder.finished(part, own, f"{id_}#{number}"))
        learnt = [part for part in made if part.targets]
        if not learnt:
            raise UserError("nothing of it is learnt")
        return learnt

    def _cuts(self, rendered: Rendered, images: Sequence[Image]) -> Iterator[tuple[int, int]]:
        """(first token, token behind the last) of each part, its head not counted: each as long as a row allows."""
        b = self.builder
        most = b.max_tokens - len(HEAD)
        learnt = np.concatenate([[0], np.cumsum(rendered.loss_weight > 0)])  # before each token
        targets = most if b.max_targets is None else b.max_targets
        start, patches = len(HEAD), 0  # of the part that is being filled
        for first, stop, number in _stretches(rendered.image_of_token):
            size = len(images[number][0]) if number >= 0 else 0
            if number >= 0 and (size > b.max_patches or stop - first > most):
                raise UserError(f"an image of {size} patches and {stop - first} tokens does not fit a row")
            while True:
                end = min(start + most, int(np.searchsorted(learnt, learnt[start] + targets, side="right")) - 1)
                if stop <= end and patches + size <= b.max_patches:
                    break
                end = first if number >= 0 else end  # an image goes to the next part whole
                yield start, end
                start, patches = end, 0
            patches += size
        yield start, len(rendered.tokens)


def _stretches(image_of_token: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first token, token behind the last, number) of the images, each with the tokens around it, and of the texts
    between them, whose number is -1."""
    of, at = image_of_token, len(HEAD)
    counts = np.bincount(of[of >= 0], minlength=1)
    for begin in np.flatnonzero((of[:-1] < 0) & (of[1:] >= 0)).tolist():
        if begin > at:
            yield at, begin, -1
        at = begin + int(counts[of[begin + 1]]) + 2
        yield begin, at, int(of[begin + 1])
    if at < len(of):
        yield at, len(of), -1


def _said_once(documents: list[Document], how: str) -> list[Document]:
    return [dataclasses.replace(documents[0], trimmed=how), *documents[1:]]
